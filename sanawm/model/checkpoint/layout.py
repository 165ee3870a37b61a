"""Layouts in which SANA-WM is published, and where each keeps its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sanawm.errors import CheckpointError
from sanawm.model.checkpoint.readers import PICKLES, find_tensors

Kind = Literal["streaming", "chunk_causal", "bidirectional", "diffusers", "file"]

STREAMING_FILE = "sana_dit/model.pt"


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint's parts are; None where it has no such part."""

    kind: Kind
    root: Path
    dit: Path  # tensor file or shard index
    vae_dir: Path | None = None
    text_dir: Path | None = None
    tokenizer_file: Path | None = None
    config_file: Path | None = None


def find_layout(root: Path) -> Layout:
    """Recognise a local checkpoint; CheckpointError, saying what was looked for, where it is none."""
    if root.is_file():
        if root.suffix not in (".safetensors", *PICKLES) and not root.name.endswith(".safetensors.index.json"):
            raise CheckpointError(f"{root.name} is not a checkpoint; expected a folder, a .safetensors file or one of {', '.join(PICKLES)}")
        return Layout("file", root, root)
    kind: Kind
    if (root / STREAMING_FILE).is_file():
        kind, dit = "streaming", root / STREAMING_FILE
    elif (found := find_tensors(root / "dit")) is not None:
        kind, dit = ("chunk_causal" if "chunk_causal" in found.name else "bidirectional"), found
    elif (found := find_tensors(root / "transformer")) is not None:
        kind, dit = "diffusers", found
    else:
        content = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{root} is not a SANA-WM checkpoint: looked for {STREAMING_FILE} (streaming), dit/*.safetensors (bidirectional, "
            f"chunk-causal) and transformer/*.safetensors (diffusers), found {content}; give the checkpoint's top folder or its tensor file"
        )
    vaes = ("ltx2_causal_vae", "vae") if kind == "streaming" else ("vae", "ltx2_causal_vae")
    text = root / "text_encoder"
    return Layout(
        kind,
        root,
        dit,
        next((root / name for name in vaes if find_tensors(root / name)), None),
        text if find_tensors(text) else None,
        next((file for name in ("text_encoder", "tokenizer") if (file := root / name / "tokenizer.json").is_file()), None),
        file if (file := root / "config.yaml").is_file() else None,
    )

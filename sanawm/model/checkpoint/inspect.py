"""What a checkpoint is, as plain data: parts, parameters, dtypes, files, and differences from the expected tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from sanawm.config import preset
from sanawm.errors import CheckpointError
from sanawm.keys import IGNORED, Shape, TensorInfo, difference, dit_tensors, fit_dit_config, parameters, text_tensors, vae_tensors
from sanawm.model.checkpoint import metadata
from sanawm.model.checkpoint.checkpoint import Checkpoint, open_checkpoint, text_shapes

T = TypeVar("T")


def expected(name: str) -> dict[str, Any]:
    """The transformer of a preset: `tensors`, official name -> shape, and `parameters`, their number.

    Only parameters are listed. The 20 `recall_gate` buffers of the official size, which checkpoints may hold and nothing reads, are not.
    """
    tensors = dit_tensors(preset(name).dit)
    return {
        "tensors": {name: list(info.shape) for name, info in tensors.items() if not info.buffer},
        "parameters": parameters(tensors),
    }


def inspect_checkpoint(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    offline: bool = False,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint; arguments as `open_checkpoint`, which also says what is raised for something that is none.

    What is wrong inside does not raise: it stands in `problems` and `ok` is then false. Plain data, ready for JSON:
    `source`, `kind`, `commit`, `ok`, `problems`, `config` (WorldConfig as JSON, null where not known), `dit` (DiTConfig as JSON; of a
    single file the latent grid is a guess), `chi_prompt` (characters, sha256, released) and `parts`: for each of `dit`, `vae`,
    `text_encoder` that is there its `parameters`, `tensors`, `dtypes` (dtype -> tensors), `groups` (part of the model -> parameters),
    `ignored` (names that are there and not used), `files` (name, bytes) and `differences` (missing, extra, misshaped).
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        checkpoint = open_checkpoint(source, revision=revision, offline=offline, text_encoder=text_encoder, vae=vae)
    problems: list[str] = []

    def attempt(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except CheckpointError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return None

    dit = attempt(lambda: checkpoint.dit_config)
    single = checkpoint.kind == "file"
    world = None if single else attempt(lambda: checkpoint.world)
    chi = None if single else attempt(lambda: checkpoint.chi_prompt)
    parts = {
        "dit": attempt(lambda: _dit(checkpoint)),
        "vae": attempt(lambda: _vae(checkpoint)) if checkpoint.layout.vae_dir else None,
        "text_encoder": attempt(lambda: _text(checkpoint)) if checkpoint.text_dir else None,
    }
    if not single:
        attempt(checkpoint.check)
    return {
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "commit": checkpoint.commit,
        "ok": not problems,
        "problems": problems,
        "config": world.to_json() if world else None,
        "dit": asdict(dit) if dit else None,
        "chi_prompt": None if chi is None else _describe_chi(chi),
        "parts": {name: part for name, part in parts.items() if part is not None},
    }


def _describe_chi(chi: str) -> dict[str, Any]:
    digest = sha256(chi.encode()).hexdigest()
    return {"characters": len(chi), "sha256": digest, "released": digest == metadata.CHI_SHA256}


def _dit(checkpoint: Checkpoint) -> dict[str, Any]:
    shapes = checkpoint.dit_shapes()
    dtypes = {name: checkpoint.dit_reader.dtypes[stored] for name, stored in checkpoint.dit_names.items()}
    config = checkpoint.section.dit if checkpoint.section else fit_dit_config(shapes, what=str(checkpoint.layout.dit))
    return _part(dit_tensors(config), shapes, dtypes, checkpoint.dit_reader.files)


def _vae(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.layout.vae_dir is not None
    reader = checkpoint.vae_reader
    table = vae_tensors(metadata.read_vae_config(checkpoint.layout.vae_dir))
    return _part(table, reader.shapes, reader.dtypes, reader.files, buffers_required=True)


def _text(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.text_dir is not None
    reader, names = text_shapes(checkpoint.text_dir)
    shapes = {name: reader.shapes[stored] for name, stored in names.items()}
    dtypes = {name: reader.dtypes[stored] for name, stored in names.items()}
    return _part(text_tensors(metadata.read_text_config(checkpoint.text_dir)), shapes, dtypes, reader.files)


def _part(
    table: Mapping[str, TensorInfo],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    files: tuple[Path, ...],
    *,
    buffers_required: bool = False,
) -> dict[str, Any]:
    diff = difference(table, shapes, buffers_required=buffers_required)
    groups: Counter[str] = Counter()
    for name, shape in shapes.items():
        if name not in IGNORED and not (name in table and table[name].buffer):
            groups[table[name].group if name in table else "unexpected"] += prod(shape)
    return {
        "parameters": sum(groups.values()),
        "tensors": len(shapes),
        "dtypes": dict(Counter(dtypes.values()).most_common()),
        "groups": dict(groups.most_common()),
        "ignored": sorted(name for name in shapes if name in IGNORED or (name in table and not table[name].used)),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        "differences": {
            "missing": list(diff.missing),
            "extra": list(diff.extra),
            "misshaped": [{"name": name, "expected": list(want), "found": list(found)} for name, want, found in diff.misshaped],
        },
    }

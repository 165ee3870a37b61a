"""An opened checkpoint: its configuration, and its tensors read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sanawm.config import DiTConfig, TextConfig, VAEConfig, WorldConfig
from sanawm.errors import CheckpointError
from sanawm.keys import Shape, TensorInfo, difference, dit_tensors, infer_dit_config, stored_prefix, text_tensors, to_official, vae_tensors
from sanawm.model.checkpoint import hub, metadata
from sanawm.model.checkpoint.layout import Kind, Layout, find_layout
from sanawm.model.checkpoint.lazy import require
from sanawm.model.checkpoint.readers import TensorReader, find_tensors, open_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = Literal["encoder", "decoder", "all"]


@dataclass(frozen=True)
class Checkpoint:
    """A stage-1 checkpoint with the VAE and text encoder that belong to it.

    Names are the official ones whatever the layout. Nothing is checked or read until asked for; what does not fit raises CheckpointError
    with one readable report.
    """

    source: str
    layout: Layout
    commit: str | None = None  # exact hub revision, None for local files

    @property
    def kind(self) -> Kind:
        return self.layout.kind

    @property
    def text_dir(self) -> Path | None:
        """Folder of the Gemma-2 text encoder, None if there is none."""
        return self.layout.text_dir

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json, None if there is none."""
        return self.layout.tokenizer_file

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """config.yaml; empty where the layout has none."""
        return metadata.read_yaml(self.layout.config_file) if self.layout.config_file else {}

    @cached_property
    def section(self) -> WorldConfig | None:
        """The `sanawm:` section of config.yaml, None in official checkpoints."""
        return metadata.world_section(self.metadata, self.layout.config_file) if self.layout.config_file else None

    @cached_property
    def dit_reader(self) -> TensorReader:
        return open_tensors(self.layout.dit)

    @cached_property
    def dit_names(self) -> dict[str, str]:
        """Official name of each stored tensor -> the name under which the file holds it."""
        stored = self.dit_reader.shapes
        try:
            prefix = stored_prefix(stored)
        except CheckpointError as error:
            raise CheckpointError(f"{self.layout.dit}: {error}") from error
        return {to_official(name.removeprefix(prefix)) if name.startswith(prefix) else name: name for name in stored}

    def dit_shapes(self) -> dict[str, Shape]:
        """Shapes of the transformer's tensors as stored, by official name; unchecked."""
        return {name: self.dit_reader.shapes[stored] for name, stored in self.dit_names.items()}

    @cached_property
    def dit_config(self) -> DiTConfig:
        """Configuration of the transformer, from the `sanawm:` section or else from the tensors' shapes, checked against every tensor.

        Without a section the latent grid and the number of text tokens are the official ones.
        """
        if self.section is None:
            return infer_dit_config(self.dit_shapes(), what=str(self.layout.dit))
        _check(dit_tensors(self.section.dit), self.dit_shapes(), self.layout.dit, "Geometry comes from the sanawm section of config.yaml.")
        return self.section.dit

    @cached_property
    def world(self) -> WorldConfig:
        """The whole configuration. CheckpointError where the files do not tell it or contradict each other."""
        dit = self.dit_config
        vae = metadata.read_vae_config(self.layout.vae_dir) if self.layout.vae_dir else None
        text = metadata.read_text_config(self.text_dir) if self.text_dir else None
        if self.section is not None:
            for name, found, stated in (("vae", vae, self.section.vae), ("text", text, self.section.text)):
                if found is not None and found != stated:
                    raise CheckpointError(
                        f"{self.source}: config.yaml's sanawm.{name} and the {name} folder's config.json differ "
                        f"({_changed(stated, found)}); use files of one checkpoint"
                    )
            return self.section
        if dit != DiTConfig():
            raise CheckpointError(
                f"{self.source} is not the official size ({_changed(DiTConfig(), dit)}) and its latent grid is not known; "
                "add a `sanawm:` section with the whole configuration to config.yaml"
            )
        section = self.metadata.get("text_encoder")
        tokens = section.get("model_max_length") if isinstance(section, dict) else None
        if isinstance(tokens, int):
            dit = replace(dit, text_tokens=tokens)
        causal = self.kind in ("streaming", "file")
        return WorldConfig(dit=dit, vae=vae or VAEConfig(decoder_causal=causal), text=text or TextConfig())

    @cached_property
    def chi_prompt(self) -> str:
        """The prefix of every prompt, from config.yaml; where there is no config.yaml the released one as diffusers carries it."""
        if self.layout.config_file:
            official = self.section is None or self.section.name == metadata.OFFICIAL_NAME
            return metadata.chi_prompt(self.metadata, self.layout.config_file, official=official)
        if (chi := metadata.packaged_chi()) is None:
            raise CheckpointError(f"{self.source} has no config.yaml, which holds the prompt prefix; put the released one there")
        return chi

    def check(self) -> None:
        """Compare every part that is there with its tensor table; CheckpointError with a report at the first part that differs."""
        world = self.world
        if self.layout.vae_dir:
            _check(vae_tensors(world.vae), self.vae_reader.shapes, self.layout.vae_dir, "Use the VAE of the same checkpoint.", True)
        if self.text_dir:
            check_text(self.text_dir, world.text)

    def iter_dit(self, dtype: torch.dtype | None = None, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The transformer's tensors by official name, one at a time, in `dtype` or as stored; all of `dit_tensors` or only `names`.

        `recall_gate` buffers, which nothing reads and a checkpoint may omit, are then zero.
        """
        torch = require("torch")
        table = dit_tensors(self.dit_config)
        for name in table if names is None else names:
            if name in self.dit_names:
                tensor = self.dit_reader.get(self.dit_names[name])
            elif name in table:
                tensor = torch.zeros(table[name].shape)
            else:
                raise KeyError(f"{name} is not a tensor of the transformer")
            yield name, tensor if dtype is None else tensor.to(dtype)

    def load_dit(self, dtype: torch.dtype | None = None, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`iter_dit` as a state dict. Where no conversion is needed tensors stay memory-mapped: do not modify them or the file."""
        return dict(self.iter_dit(dtype, names))

    def load_vae(self, part: Part = "all", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The VAE's tensors under diffusers' names: its encoder, its decoder or both, always with latents_mean and latents_std."""
        if self.layout.vae_dir is None:
            raise CheckpointError(f"{self.source} has no VAE folder; give one with --vae (SANA-WM_streaming has the causal VAE)")
        table = vae_tensors(metadata.read_vae_config(self.layout.vae_dir) if self.section is None else self.section.vae)
        _check(table, self.vae_reader.shapes, self.layout.vae_dir, "Use the VAE of the same checkpoint.", True)
        chosen = [name for name, info in table.items() if part == "all" or info.group in (part, "statistics")]
        tensors = ((name, self.vae_reader.get(name)) for name in chosen)
        return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors}

    @cached_property
    def vae_reader(self) -> TensorReader:
        assert self.layout.vae_dir is not None
        file = find_tensors(self.layout.vae_dir)
        if file is None:
            raise CheckpointError(f"{self.layout.vae_dir} has no .safetensors file; download it again")
        return open_tensors(file)

    def part_files(self) -> dict[str, tuple[Path, ...]]:
        """Files of each part: `dit`, `vae`, `text_encoder`, `config`."""
        layout = self.layout
        parts = {
            "dit": self.dit_reader.files,
            "vae": _folder_files(layout.vae_dir),
            "text_encoder": _folder_files(layout.text_dir, layout.tokenizer_file),
            "config": (layout.config_file,) if layout.config_file else (),
        }
        return {part: files for part, files in parts.items() if files}

    def fingerprint(self) -> str:
        """SHA-256 over the parts' file names, sizes and bytes, hex. Reads everything, once: about a second a gigabyte."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        for part, files in self.part_files().items():
            for file in files:
                with open(file, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                total.update(json.dumps([part, file.name, file.stat().st_size, digest]).encode())
        return total.hexdigest()


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint in any of its published layouts.

    `source` is a folder, a .safetensors or .pt file, or `hf://owner/repo[/path][@revision]`. `text_encoder` and `vae` (a folder or a hub
    address) replace the checkpoint's own: the official stage-1 text encoder is a repository of its own, and the chunk-causal checkpoint has
    no VAE. Raises CheckpointError.
    """
    resolved = hub.resolve(source, hub.WORLD_FILES, revision=revision, offline=offline)
    layout = find_layout(resolved.path)
    if text_encoder is not None:
        folder = hub.resolve(text_encoder, hub.TEXT_FILES, offline=offline).path
        folder = folder / "text_encoder" if find_tensors(folder / "text_encoder") else folder
        if find_tensors(folder) is None:
            raise CheckpointError(f"{text_encoder} has no .safetensors file; expected a Gemma-2 folder with config.json and tokenizer.json")
        tokenizer = next((f for f in (folder / "tokenizer.json", folder.parent / "tokenizer" / "tokenizer.json") if f.is_file()), None)
        layout = replace(layout, text_dir=folder, tokenizer_file=tokenizer)
    if vae is not None:
        folder = hub.resolve(vae, hub.VAE_FILES, offline=offline).path
        inner = next((folder / name for name in ("ltx2_causal_vae", "vae") if find_tensors(folder / name)), folder)
        if find_tensors(inner) is None:
            raise CheckpointError(f"{vae} has no .safetensors file; expected an LTX-2 VAE folder or a checkpoint that has one")
        layout = replace(layout, vae_dir=inner)
    return Checkpoint(str(source), layout, resolved.commit)


def text_shapes(folder: Path) -> tuple[TensorReader, dict[str, str]]:
    """Reader of a Gemma-2 folder, and Gemma2Model's name -> stored name; the unused language-model head is left out."""
    file = find_tensors(folder)
    if file is None:
        raise CheckpointError(f"{folder} has no .safetensors file; expected a Gemma-2 folder")
    reader = open_tensors(file)
    return reader, {name.removeprefix("model."): name for name in reader.shapes if name != "lm_head.weight"}


def check_text(folder: Path, config: TextConfig) -> None:
    """Compare a Gemma-2 folder's tensors with the table of `config`; CheckpointError with a report if they differ."""
    reader, names = text_shapes(folder)
    shapes = {name: reader.shapes[stored] for name, stored in names.items()}
    _check(text_tensors(config), shapes, folder, "Use the complete text encoder, gemma-2-2b-it for the official model.")


def _check(table: Mapping[str, TensorInfo], shapes: Mapping[str, Shape], where: Path, remedy: str, buffers_required: bool = False) -> None:
    if diff := difference(table, shapes, buffers_required=buffers_required):
        raise CheckpointError(diff.report(str(where), remedy))


def _changed(expected: Any, found: Any) -> str:
    names = [name for name in vars(expected) if getattr(expected, name) != getattr(found, name)]
    return ", ".join(f"{name} {getattr(found, name)} instead of {getattr(expected, name)}" for name in names[:4])


def _folder_files(folder: Path | None, *more: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    found = {file for suffix in ("*.safetensors", "*.json") for file in folder.glob(suffix)}
    return tuple(sorted(found | {file for file in more if file is not None}))

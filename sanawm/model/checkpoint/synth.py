"""Synthetic checkpoints: random weights in the published layouts, streamed to disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sanawm.config import DiTConfig, Dtype, WorldConfig, preset
from sanawm.errors import CheckpointError
from sanawm.keys import dit_tensors, text_tensors, to_diffusers, vae_tensors
from sanawm.model.checkpoint import metadata
from sanawm.model.checkpoint.ahead import ahead
from sanawm.model.checkpoint.layout import STREAMING_FILE
from sanawm.model.checkpoint.lazy import require
from sanawm.model.checkpoint.tiny_tokenizer import CHI_PROMPT, write_tokenizer
from sanawm.model.checkpoint.values import bfloat16_bits, synth_blocks, synth_tensor
from sanawm.model.checkpoint.writers import Entry, Fill, Piece, write_safetensors, write_torch

__all__ = ["LAYOUTS", "SynthLayout", "synth_tensor", "synthesize"]

SynthLayout = Literal["streaming", "bidirectional", "diffusers"]
LAYOUTS: tuple[SynthLayout, ...] = ("streaming", "bidirectional", "diffusers")
Progress = Callable[[str, int, int], None]  # tensor that is being written, bytes written, bytes in all

BIDIRECTIONAL_FILE = "dit/sana_wm_1600m_720p.safetensors"
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# Rows of the unused position table, (720 // 32) squared, as the official checkpoints store it.
_POSITIONS = 484


def synthesize(
    path: str | Path,
    config: str | WorldConfig = "tiny",
    *,
    seed: int = 0,
    layout: SynthLayout = "streaming",
    dtype: Dtype | None = None,
    text: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint to the folder `path`, laid out as the published ones.

    `config` is a preset's name or a configuration. `dtype` is that of every tensor: by default float32 for small models and bfloat16 for
    the official size. `text=False` leaves the text encoder out (5 GB at full size). Values: see `values`; the same seed gives the same
    tensors in every layout. `streaming` also stores a critic and an optimizer beside the model, as the released file does. The name in
    the configuration that is written is never the official one, whose prompt prefix is not part of this package.

    Tensors are computed on all cores, with at most 128 MB in memory for each, and the folder appears only when it is complete. Raises
    CheckpointError if `path` is in use or the disk is too small.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown checkpoint layout '{layout}'; choose one of {', '.join(LAYOUTS)}")
    world = preset(config) if isinstance(config, str) else config
    if dtype is None:
        dtype = "bfloat16" if world.dit == DiTConfig() else "float32"
    if world.name == metadata.OFFICIAL_NAME:
        world = replace(world, name=f"{world.name}-random")
    world = replace(world, vae=replace(world.vae, decoder_causal=layout == "streaming"))
    if path.exists() and not overwrite and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"{path} already exists; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.{os.getpid()}.partial"
    work.mkdir()
    try:
        _Writer(work, world, seed, dtype, progress).write(layout, text)
        _move(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _move(work: Path, path: Path) -> None:
    if path.exists():
        old = work.with_suffix(".old")
        path.rename(old)
        work.rename(path)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        work.rename(path)


class _Writer:
    def __init__(self, root: Path, world: WorldConfig, seed: int, dtype: Dtype, progress: Progress | None) -> None:
        self.root, self.world, self.seed, self.dtype, self.progress = root, world, seed, dtype, progress
        self.done = self.total = 0

    def write(self, layout: SynthLayout, text: bool) -> None:
        dit = {name: info.shape for name, info in dit_tensors(self.world.dit).items()}
        if layout != "diffusers":
            dit["pos_embed"] = (1, _POSITIONS, self.world.dit.hidden)
            dit["y_embedder.y_embedding"] = (self.world.dit.text_tokens, self.world.dit.caption_channels)
        parts = {"dit": self._entries(dit), "vae": self._entries({n: i.shape for n, i in vae_tensors(self.world.vae).items()})}
        if text:
            parts["text"] = self._entries({n: i.shape for n, i in text_tensors(self.world.text).items()})
        training = self._training_state(dit) if layout == "streaming" else {}
        # In the order in which they are written.
        everything = list(_leaves({"dit": parts["dit"], "training": training, **parts}))
        self.total = sum(entry.nbytes for entry in everything)
        if (free := shutil.disk_usage(self.root).free) < self.total * 1.01 + 1e6:
            raise CheckpointError(f"the checkpoint needs {self.total / 1e9:.1f} GB and {self.root.parent} has {free / 1e9:.1f} GB free")

        self._yaml()
        with ahead(everything, self._compute) as computed:

            def fill(entry: Entry) -> Iterator[Piece]:
                for piece in computed(entry):
                    yield piece
                    self.done += memoryview(piece).nbytes
                    if self.progress:
                        self.progress(entry.key, self.done, self.total)

            self._parts(layout, parts, training, fill)

    def _parts(self, layout: SynthLayout, parts: Mapping[str, dict[str, Entry]], training: Mapping[str, Any], fill: Fill) -> None:
        if layout == "streaming":
            file = self._folder(STREAMING_FILE)
            write_torch(file, {"generator": {f"model.{n}": e for n, e in parts["dit"].items()}, **training}, fill)
        elif layout == "bidirectional":
            write_safetensors(self._folder(BIDIRECTIONAL_FILE), parts["dit"], fill)
        else:
            stored = {to_diffusers(name): entry for name, entry in parts["dit"].items()}
            write_safetensors(self._folder(f"transformer/{_DIFFUSERS_FILE}"), stored, fill, {"format": "pt"})
            self._json("transformer/config.json", _diffusers_config(self.world.dit))
            self._json("model_index.json", _MODEL_INDEX)
        vae = "ltx2_causal_vae" if layout == "streaming" else "vae"
        write_safetensors(self._folder(f"{vae}/{_DIFFUSERS_FILE}"), parts["vae"], fill, {"format": "pt"})
        self._json(f"{vae}/config.json", metadata.vae_config_json(self.world.vae))
        if "text" in parts:
            stored = {f"model.{name}": entry for name, entry in parts["text"].items()}
            write_safetensors(self._folder("text_encoder/model.safetensors"), stored, fill, {"format": "pt"})
            self._json("text_encoder/config.json", metadata.text_config_json(self.world.text))
            folder = "tokenizer" if layout == "diffusers" else "text_encoder"
            write_tokenizer(self._folder(f"{folder}/tokenizer.json").parent, self.world.text.vocab)

    def _entries(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
        return {name: Entry(name, shape, self.dtype) for name, shape in shapes.items()}

    def _training_state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """A few tensors of a critic, under the model's own names and with other values, and of its optimizer."""
        names = ("x_embedder.proj.weight", "t_block.1.bias", "blocks.0.attn.qkv.weight")
        critic = {f"model.{name}": Entry(f"critic/{name}", shapes[name], self.dtype) for name in names}
        moments = {
            index: {
                "step": Entry(f"optimizer/{name}/step", (), "float32"),
                "exp_avg": Entry(f"optimizer/{name}/exp_avg", shapes[name], "float32"),
            }
            for index, name in enumerate(names)
        }
        groups = [{"lr": 1e-5, "betas": (0.0, 0.999), "weight_decay": 0.0, "params": list(moments)}]
        return {"critic": critic, "generator_optimizer": {"state": moments, "param_groups": groups}, "step": 3000}

    def _compute(self, entry: Entry) -> Iterator[Piece]:
        for block in synth_blocks(entry.key, entry.shape, self.seed):
            values = bfloat16_bits(block) if entry.dtype == "bfloat16" else block.astype("<f4", copy=False)
            yield values.data.cast("B")

    def _folder(self, name: str) -> Path:
        file = self.root / name
        file.parent.mkdir(exist_ok=True)
        return file

    def _json(self, name: str, data: Mapping[str, Any]) -> None:
        self._folder(name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _yaml(self) -> None:
        dit = self.world.dit
        data = {
            "model": {
                "model": "SanaMSVideoCamCtrl_1600M_P1_D20",
                "softmax_every_n": dit.softmax_every,
                "linear_head_dim": dit.head_dim,
                "conv_kernel_size": dit.conv_kernel,
                "mlp_ratio": dit.mlp_ratio,
                "chunk_plucker_channels": dit.plucker_channels,
            },
            "vae": {"vae_latent_dim": self.world.vae.latent_channels, "vae_stride": [8, *[self.world.vae.spatial_stride] * 2]},
            "text_encoder": {"text_encoder_name": "gemma2", "model_max_length": dit.text_tokens, "chi_prompt": list(CHI_PROMPT)},
            "sanawm": self.world.to_json(),
        }
        text = require("yaml").safe_dump(data, sort_keys=False, width=120)
        (self.root / "config.yaml").write_text("# Random weights in the layout of SANA-WM, not a trained model.\n" + text, encoding="utf-8")


def _leaves(state: Any) -> Iterator[Entry]:
    if isinstance(state, Entry):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, Iterable) and not isinstance(state, str):
        for value in state:
            yield from _leaves(value)


_MODEL_INDEX = {
    "_class_name": "SanaWMPipeline",
    "transformer": ["diffusers", "SanaWMTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLLTX2Video"],
    "text_encoder": ["transformers", "Gemma2ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
}


def _diffusers_config(dit: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "SanaWMTransformer3DModel",
        "in_channels": dit.in_channels,
        "num_layers": dit.depth,
        "hidden_size": dit.hidden,
        "num_attention_heads": dit.cross_heads,
        "softmax_every_n": dit.softmax_every,
        "linear_head_dim": dit.head_dim,
        "conv_kernel_size": dit.conv_kernel,
        "chunk_plucker_channels": dit.plucker_channels,
        "chunk_plucker_post_attn_blocks": dit.depth,
        "caption_channels": dit.caption_channels,
        "mlp_ratio": float(dit.mlp_ratio),
    }

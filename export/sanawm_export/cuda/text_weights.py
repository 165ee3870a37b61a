"""Packed weights of the text encoder, and the settings that its plan takes as given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sanawm.config import TextConfig
from sanawm.errors import UserError
from sanawm.keys import text_tensors
from sanawm_export.cuda.formats import Formats
from sanawm_kernels.text.plans import LOGIT_CAP, NORM_EPS, ROPE_THETA, WINDOW
from sanawm_runtime.engines._cuda_pack import Packed, Source

_SETTINGS: Mapping[str, Any] = {
    "attn_logit_softcapping": LOGIT_CAP, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "sliding_window": WINDOW,
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
}  # fmt: skip
NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


class TextWeights:
    """Packed tensors by name, as the kernels read them; `dtype` is the activations'. Names of layers start with `blocks.`."""

    def __init__(self, config: TextConfig, dtype: str) -> None:
        self.config = config
        self.dtype = dtype
        self.formats = Formats()
        self._shapes = {name: info.shape for name, info in text_tensors(config).items()}

    @cached_property
    def tensors(self) -> Mapping[str, Packed]:
        return {packed.name: packed for packed in self._all()}

    def _stacked(self, name: str, *sources: str) -> Packed:
        """A product's weight from the rows of one or several matrices."""
        found = tuple(Source(f"{source}.weight", self._shapes[f"{source}.weight"]) for source in sources)
        rows = sum(source.shape[0] for source in found)
        return Packed(name, self.dtype, (rows, found[0].shape[1]), "rows", found, rounding=self.dtype)

    def _gain(self, name: str, source: str) -> Packed:
        shape = self._shapes[source]
        return Packed(name, "float32", shape, "gain", (Source(source, shape),), rounding=self.dtype)

    def _all(self) -> Iterator[Packed]:
        c = self.config
        yield self._stacked("embed", "embed_tokens")
        # The angles' frequencies, 1 / theta^(2i/D).
        exponents = np.arange(c.head_dim // 2) * (2 / c.head_dim)
        frequencies = tuple(float(f) for f in (ROPE_THETA**-exponents).astype(np.float32))
        yield Packed("frequencies", "float32", (len(frequencies),), "constant", (), frequencies)
        for i in range(c.layers):
            name, layer = f"blocks.{i}", f"layers.{i}"
            yield self._stacked(f"{name}.qkv.weight", *(f"{layer}.self_attn.{part}_proj" for part in "qkv"))
            yield self._stacked(f"{name}.out.weight", f"{layer}.self_attn.o_proj")
            yield self._stacked(f"{name}.gate_up.weight", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            yield self._stacked(f"{name}.down.weight", f"{layer}.mlp.down_proj")
            for norm in NORMS:
                yield self._gain(f"{name}.{norm}", f"{layer}.{norm}_layernorm.weight")
        yield self._gain("norm", "norm.weight")


def check_text_settings(folder: Path) -> None:
    """Raise UserError where a Gemma-2 folder's config.json states other settings than the kernels compute with; absent ones are Gemma 2's."""
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated |= stated.get("rope_parameters") or {}
    for name, wanted in _SETTINGS.items():
        if stated.get(name, wanted) != wanted:
            raise UserError(f"{folder}: {name} is {stated[name]!r}, and the cuda engine computes with {wanted!r}; use --engine onnxruntime")

"""What every lowering needs: the tape, the weights, the target, and tensors with their quantized forms."""

from __future__ import annotations

from dataclasses import dataclass

from sanawm.config import DiTConfig
from sanawm_export.cuda.tape import Tape
from sanawm_export.cuda.text_weights import TextWeights
from sanawm_export.cuda.weights import DiTWeights
from sanawm_runtime.engines._cuda_plan import TRITON_TYPES, View


@dataclass(frozen=True)
class Rows:
    """Tokens (M, K): in the activations' dtype, quantized, or both.

    `quant` says how: "fp8" under one `scale`, "fp8_rows" with `scales` of the rows, "nvfp4" with block `scales` under one `scale`.
    """

    plain: View | None
    quant: str | None = None
    codes: View | None = None
    scales: View | None = None
    scale: View | None = None

    def last(self, size: int) -> Rows:
        """The last `size` rows."""
        plain, codes, scales = (None if view is None else view.last(size) for view in (self.plain, self.codes, self.scales))
        return Rows(plain, self.quant, codes, scales, self.scale)

    @property
    def values(self) -> View:
        """The plain tensor; ValueError where only the quantized one is kept."""
        if self.plain is None:
            raise ValueError("these rows exist in quantized form alone")
        return self.plain


@dataclass(frozen=True)
class Context:
    """One program's lowering."""

    tape: Tape
    weights: DiTWeights | TextWeights
    target: int

    @property
    def config(self) -> DiTConfig:
        """The transformer's configuration; only its programs may ask for it."""
        assert isinstance(self.weights, DiTWeights)
        return self.weights.config

    @property
    def kind(self) -> str:
        """Triton's name of the activations' dtype."""
        return TRITON_TYPES[self.weights.dtype]

    @property
    def dtype(self) -> str:
        return self.weights.dtype

    def weight(self, name: str) -> View:
        packed = self.weights.tensors[name]
        return self.tape.weight(name, packed.dtype, packed.shape)

    def has(self, name: str) -> bool:
        return name in self.weights.tensors

    def tensor(self, name: str, *shape: int, dtype: str | None = None) -> View:
        return self.tape.tensor(name, shape, dtype or self.dtype)

"""What a layer costs on a target: bytes of weights and time of its matrix product.

The rates are assumptions: dense peak rates with float32 accumulation and memory bandwidths from the vendors' data sheets, collected in November
2026. No product reaches them; they serve to weigh formats against each other, not to predict a speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sanawm.config import WorldConfig
from sanawm_calibration.errors import RecipeError
from sanawm_calibration.recipe import Format, LayerFormat
from sanawm_calibration.roles import Layer, model_layers


@dataclass(frozen=True)
class Rates:
    """Assumed peak rates of a GPU: TFLOP/s of each format (None where it has no such units) and bandwidth in TB/s."""

    bf16: float
    fp8: float
    nvfp4: float | None
    bandwidth: float

    def tflops(self, layer_format: Format) -> float | None:
        return {"bf16": self.bf16, "fp8": self.fp8, "nvfp4": self.nvfp4}[layer_format]


RATES = {
    "rtx5090": Rates(209.5, 419, 1676, 1.79),
    "rtx4090": Rates(165, 330, None, 1.01),
    "h100": Rates(989, 1979, None, 3.35),
    "h200": Rates(989, 1979, None, 4.8),
    "b200": Rates(2250, 4500, 9000, 8.0),
    "dgx-spark": Rates(62, 125, 500, 0.273),
}
DEFAULT_TARGET = "rtx5090"
# Forwards of a chunk: four denoising steps and the clean pass.
_FORWARDS = 5


@dataclass(frozen=True)
class CostModel:
    """Costs of one steady chunk of a world on a target."""

    config: WorldConfig
    target: str

    def __post_init__(self) -> None:
        if self.target not in RATES:
            raise RecipeError(f"no rates are known for the target '{self.target}'; choose one of {', '.join(RATES)}")

    @property
    def rates(self) -> Rates:
        return RATES[self.target]

    def supports(self, layer_format: Format) -> bool:
        return self.rates.tflops(layer_format) is not None

    def _evaluations(self, layer: Layer) -> tuple[int, int]:
        """(rows of the product, times a chunk); what is computed once a prompt costs a chunk nothing."""
        dit = self.config.dit
        tokens = self.config.stream.chunk_frames * dit.tokens_per_frame
        return {"forward": (tokens, _FORWARDS), "camera": (tokens, 1), "prompt": (dit.text_tokens, 0)}[layer.role.program]

    def seconds(self, layer: Layer, layer_format: LayerFormat) -> float:
        """Least time of a layer's products in a steady chunk: the larger of arithmetic and memory traffic."""
        rate = self.rates.tflops(layer_format.format)
        if rate is None:
            raise RecipeError(f"{self.target} has no {layer_format.format} units; choose another format for {layer.name}")
        rows, times = self._evaluations(layer)
        work = 2 * rows * layer.weights / (rate * 1e12) + 4 * layer_format.lowrank * rows * (layer.rows + layer.columns) / (self.rates.bf16 * 1e12)
        traffic = layer_format.weight_bytes(layer) + 2 * rows * (layer.rows + layer.columns)
        return times * max(work, traffic / (self.rates.bandwidth * 1e12))

    def total(self, table: Mapping[str, LayerFormat]) -> tuple[float, float]:
        """(bytes of weights, seconds of products in a steady chunk) of a whole layer table."""
        layers = model_layers(self.config.dit)
        pairs = [(layers[name], layer_format) for name, layer_format in table.items()]
        return sum(f.weight_bytes(layer) for layer, f in pairs), sum(self.seconds(layer, f) for layer, f in pairs)

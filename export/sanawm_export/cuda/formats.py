"""Number formats of the transformer's products: what the precision asks for, as far as kernels and calibration allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sanawm.config import DiTConfig
from sanawm.errors import UserError
from sanawm_calibration.recipe import load_recipe

Kind = Literal["plain", "fp8", "nvfp4"]
PRECISIONS = ("bf16", "fp8", "mixed", "nvfp4")
# NVFP4 activations without calibration: their largest magnitude is taken to be this. The two-level scale loses nothing as long as it is at most
# 64 times too large (21.95 dB at the true maximum, 21.92 at 512 times it, on synthetic layers), so true maxima of 8 to 512 are served alike.
ASSUMED_AMAX = 512.0
E4M3_MAX, E2M1_MAX = 448.0, 6.0
# The camera's projections keep 8 bits: their errors are lost camera following. What runs once a chunk or a prompt stays plain. In `mixed` the
# FFN's early blocks keep 8 bits too.
_NVFP4 = ("proj", "cross_q", "cross_proj", "inverted", "point", "temporal")
_MIXED = ("cross_proj", "temporal", "inverted", "point")
_FP8 = ("merged", "out_cam", "proj", "cross_q", "cross_proj", "inverted", "point")
_LATE = ("inverted", "point")
# The published search keeps the FFN of the first 6 of 20 blocks in FP8 (SANA-Streaming).
_EARLY_SHARE = 0.3
# Layers that read a block's modulated input, in the order in which their rows are stacked; then those of a recurrent block's write strengths and
# decays, which no precision quantizes: an error there multiplies the state of all frames that follow.
PROJECTIONS = ("qkv", "q_proj_cam", "k_proj_cam", "v_proj_cam", "output_gate")
GATES = ("beta_proj", "gate_proj")


@dataclass(frozen=True)
class Format:
    """How a product multiplies: its kind, and the static scale of its activations.

    `plain` is the activations' own dtype. `fp8` activations have one scale where it was calibrated (`scale`), else each row its own; so have the
    weights. `nvfp4` needs a global scale. `recipe` is what the calibration calls the format (`nvfp4/mse`): its weights are quantized by the
    calibration's methods. Without one they are rounded to their own maxima.
    """

    kind: Kind = "plain"
    scale: float | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "nvfp4" and self.scale is None:
            raise ValueError("NVFP4 activations need a global scale, found none")
        if self.kind == "plain" and self.scale is not None:
            raise ValueError("a product that is not quantized has no activation scale")
        if self.recipe is not None and self.scale is None:
            raise ValueError("a recipe's format has a calibrated activation scale, found none")

    @property
    def calibrated(self) -> bool:
        return self.recipe is not None

    @property
    def quant(self) -> str | None:
        """What the kernels call the quantization of its activations."""
        return {"plain": None, "fp8": "fp8_rows" if self.scale is None else "fp8", "nvfp4": "nvfp4"}[self.kind]


PLAIN = Format()


@dataclass(frozen=True)
class Formats:
    """Format of each product by its packed name (`blocks.3.merged`); what is not named is plain.

    `splits` has, by block, the layers of each product that reads the block's modulated input; a block that is not named has one product of all
    PROJECTIONS and GATES, and in the others the gates have a product of their own.
    """

    table: Mapping[str, Format] = field(default_factory=dict)
    splits: Mapping[int, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    def of(self, name: str) -> Format:
        return self.table.get(name, PLAIN)

    def merged(self, block: int) -> dict[str, tuple[str, ...]]:
        """Layers of each product of a block's modulated input, by packed name."""
        groups = self.splits.get(block)
        if groups is None:
            return {f"blocks.{block}.merged": (*PROJECTIONS, *GATES)}
        found = {f"blocks.{block}.merged" + (f".{n}" if len(groups) > 1 else ""): group for n, group in enumerate(groups)}
        return found | {f"blocks.{block}.gates": GATES}

    def uses(self, kind: Kind) -> bool:
        return any(f.kind == kind for f in self.table.values())

    def summary(self) -> dict[str, int]:
        """Number of quantized products of each kind, as the kernels call it."""
        return dict(sorted(Counter(f.quant for f in self.table.values() if f.quant).items()))


def formats_for(config: DiTConfig, precision: str) -> Formats:
    """Formats of a precision, one of PRECISIONS, without calibration.

    FP8 activations are scaled row by row as they come, and NVFP4 ones by ASSUMED_AMAX. The temporal convolution needs one scale for three frames,
    so in FP8 it stays plain. Raises UserError for a recipe, which needs calibration, and for an unknown precision.
    """
    if precision not in PRECISIONS:
        load_recipe(precision)
        raise UserError(f"--precision {precision} needs calibrated scales; run `sanawm calibrate` and give its file with --calibration")
    table: dict[str, Format] = {}
    for i in range(config.depth) if precision != "bf16" else ():
        for part in dict.fromkeys((*_FP8, "temporal")):
            name = f"blocks.{i}.{part}"
            if _is_nvfp4(precision, part, i, config.depth):
                table[name] = Format("nvfp4", ASSUMED_AMAX / (E4M3_MAX * E2M1_MAX))
            elif part in _FP8:
                table[name] = Format("fp8")
    return Formats(table, dict.fromkeys(range(config.depth), (PROJECTIONS,)) if table else {})


def _is_nvfp4(precision: str, part: str, block: int, depth: int) -> bool:
    if precision == "nvfp4":
        return part in _NVFP4
    return precision == "mixed" and part in _MIXED and (part not in _LATE or block >= _EARLY_SHARE * depth)

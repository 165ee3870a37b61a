"""What to compile: one record per kernel variant, and the list of all variants the model needs.

A package of kernels takes part by having a module `variants` with `variants(sizes: ModelSizes, target: int) -> list[KernelVariant]`.
Importing this module, or a package's `variants`, needs neither torch nor triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sanawm_kernels
from sanawm_kernels.aot import grid

# Compute capabilities (major * 10 + minor) the kernels are written for.
TARGETS = (80, 86, 89, 90, 100, 103, 120, 121)

_TYPE = re.compile(r"(\*(bf16|fp16|fp32|fp64|fp8e4nv|fp8e5|u8|i8|i32|i64)|bf16|fp16|fp32|fp64|i1|i8|i32|u32|i64)(:16)?")
_BLOCKS = re.compile(r"tensordesc<(bf16|fp16|fp32|fp8e4nv)\[(\d+(?:, \d+)*)\]>")


def blocks(kind: str, *shape: int) -> str:
    """Signature entry of a tensor that the kernel takes in blocks of that shape, through a descriptor of the tensor memory accelerator."""
    return f"tensordesc<{kind}[{', '.join(map(str, shape))}]>"


def block_of(entry: str) -> tuple[str, tuple[int, ...]] | None:
    """Element type and shape of a `blocks` entry; None for any other."""
    found = _BLOCKS.fullmatch(entry)
    return None if found is None else (found[1], tuple(map(int, found[2].split(", "))))


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that decide which variants exist; the defaults are the official 2.6B model streaming at 704x1280.

    `frames` lists the chunk lengths that occur (first, steady), `cached` the cached key lengths of the softmax window in frames, `timesteps`
    counts those with a modulation row (the denoising steps and 0). `decoder_widths` are those of the video decoder's stages as the
    checkpoint lists them, the widest last, `encoder_widths` what the encoder's stages make, and `patch` is the side of a pixel patch. The text
    encoder is as wide as the captions.
    """

    hidden: int = 2240
    head_dim: int = 112
    height: int = 22
    width: int = 40
    frames: tuple[int, ...] = (3, 4)
    cached: tuple[int, ...] = (0, 4, 7)
    mlp_ratio: int = 3
    text_tokens: int = 300
    caption_channels: int = 2304
    latent_channels: int = 128
    plucker_channels: int = 48
    timesteps: int = 5
    decoder_widths: tuple[int, ...] = (256, 512, 1024)
    encoder_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    patch: int = 4
    batch: int = 1
    rms_clamp: bool = False
    camera_conv_tail: bool = True
    text_heads: int = 8
    text_kv_heads: int = 4
    text_head_dim: int = 256
    text_intermediate: int = 9216

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def glu_width(self) -> int:
        return self.hidden * self.mlp_ratio

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Rotary pairs of a head for time, rows and columns."""
        side = self.head_dim // 6
        return self.head_dim // 2 - 2 * side, side, side

    @property
    def camera_rope_pairs(self) -> tuple[int, int, int]:
        """The same of the second half of a head, which the camera branch turns."""
        side = self.head_dim // 12
        return self.head_dim // 4 - 2 * side, side, side


# Sizes by the name of a model preset; `tiny` is the model of the examples and tests.
PRESETS = {
    "full": ModelSizes(),
    "tiny": ModelSizes(
        128, 32, 6, 10, text_tokens=512, caption_channels=64, latent_channels=24, decoder_widths=(24, 48, 96), encoder_widths=(24, 48, 64, 64),
        text_heads=4, text_kv_heads=2, text_head_dim=16, text_intermediate=128,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KernelVariant:
    """One kernel, specialised and ready to be compiled.

    name: unique, stable, dotted (`gdn.summarize.d112.bf16`); the launcher looks it up.
    kernel: import path of the `@triton.jit` function, `module:function`.
    signature: the run-time arguments and their Triton types, in any order; `:16` promises an address aligned to 16 bytes, or an
        integer that is a multiple of 16 (`*bf16:16`, `i32:16`). The launcher must keep the promise. `blocks` says that a descriptor is taken.
    constexprs: every other parameter and its value.
    grid: three grid rules (see `sanawm_kernels.aot.grid`) over integer arguments, integer constexprs and `grid_sizes`.
    grid_sizes: names the grid needs that the kernel does not take; the launcher supplies them.
    options: further compiler options (`maxnreg`, `num_ctas`, `enable_fp_fusion`).
    hot: spills of this variant fail the build on sm_90 and sm_120 unless `spill_reason` says why they are accepted.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    grid: tuple[str, str, str]
    num_warps: int = 4
    num_stages: int = 2
    grid_sizes: tuple[str, ...] = ()
    targets: tuple[int, ...] = TARGETS
    options: Mapping[str, Any] = field(default_factory=dict)
    hot: bool = False
    spill_reason: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", self.name):
            raise ValueError(f"kernel variant name '{self.name}' must be dotted lower-case words")
        if self.kernel.count(":") != 1:
            raise ValueError(f"{self.name}: kernel '{self.kernel}' must be 'module:function'")
        for argument, kind in self.signature.items():
            if not _TYPE.fullmatch(kind) and block_of(kind) is None:
                raise ValueError(f"{self.name}: argument {argument} has unknown type '{kind}'")
        if both := sorted(set(self.signature) & set(self.constexprs)):
            raise ValueError(f"{self.name}: {', '.join(both)} given both as arguments and as constants")
        integers = {a for a, kind in self.signature.items() if kind.split(":")[0] in ("i32", "i64", "u32")}
        integers |= {c for c, value in self.constexprs.items() if isinstance(value, int)}
        for rule in self.grid:
            if unknown := sorted(grid.names(rule) - integers - set(self.grid_sizes)):
                raise ValueError(f"{self.name}: grid rule '{rule}' names {', '.join(unknown)}, neither integer arguments nor in grid_sizes")

    def launch_grid(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """Grid for run-time sizes; integer constexprs are known already."""
        known = {c: value for c, value in self.constexprs.items() if isinstance(value, int)} | dict(sizes)
        x, y, z = (grid.evaluate(rule, known) for rule in self.grid)
        return x, y, z


def all_variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Every variant the model needs on compute capability `target`, sorted by name; ValueError if two that differ share a name."""
    found: dict[str, KernelVariant] = {}
    for package in sorted(m.name for m in pkgutil.iter_modules(sanawm_kernels.__path__, "sanawm_kernels.") if m.ispkg):
        module = f"{package}.variants"
        if importlib.util.find_spec(module) is None:
            continue
        for variant in importlib.import_module(module).variants(sizes, target):
            if found.get(variant.name, variant) != variant:
                raise ValueError(f"two kernel variants are named {variant.name}")
            if target in variant.targets:
                found[variant.name] = variant
    return [found[name] for name in sorted(found)]

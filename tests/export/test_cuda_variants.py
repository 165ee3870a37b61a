"""The ahead-of-time list of kernels against what the launch plans take, and what a variant's name tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from sanawm.config import WorldConfig, tiny_config
from sanawm.programs import Geometry
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_export.cuda.build import merged_variants
from sanawm_export.cuda.formats import PRECISIONS, Formats, formats_for
from sanawm_export.cuda.lower import dit_weights, lower_euler, lower_part_decoder, lower_part_dit
from sanawm_export.cuda.recipes import recipe_formats
from sanawm_export.cuda.tape import Lowered
from sanawm_export.cuda.vae_weights import DecoderWeights
from sanawm_kernels.aot.spec import PRESETS, TARGETS, KernelVariant, all_variants
from sanawm_kernels.attention import plans as attention
from sanawm_kernels.attention.table import PairTile, Tile
from sanawm_kernels.chunk import plans as chunk
from sanawm_kernels.conv import plans as conv
from sanawm_kernels.gdn import plans as gdn
from sanawm_kernels.gemm import plans as gemm
from sanawm_kernels.gemm.plans import Config, Finish, Operand
from sanawm_kernels.tokenwise import block_plans, plans

WORLDS = {"full": WorldConfig(), "tiny": tiny_config()}
# NVFP4 plans are built for targets that have its instructions and read block scales in rows.
CASES = [("full", 90, p) for p in ("bf16", "fp8")] + [("full", 120, p) for p in PRECISIONS] + [("tiny", 120, "mixed")]
RECIPES = ("fp8", "nvfp4", "nvfp4-guarded", "nvfp4-official")


@cache
def listed(name: str, target: int) -> dict[str, KernelVariant]:
    return {variant.name: variant for variant in all_variants(PRESETS[name], target)}


def recipe_of(world: WorldConfig, name: str) -> Formats:
    """Formats of a recipe with scales of 1, on which no kernel depends."""
    return recipe_formats(world.dit, layer_table(load_recipe(name), world.dit), lambda layer, entry: 1.0).formats


def planned(world: WorldConfig, target: int, precision: str, calibrated: bool) -> dict[str, KernelVariant]:
    """Kernels of every plan of a bundle; ValueError where one name means two."""
    geometry = Geometry(world, world.dit.text_tokens, 4, "bfloat16")
    formats = recipe_of(world, precision) if calibrated else formats_for(world.dit, precision)
    lowered: dict[str, Lowered] = lower_part_dit(geometry, dit_weights(geometry, formats), target)
    lowered |= lower_euler(geometry) | lower_part_decoder(geometry, DecoderWeights(world.vae, geometry.dtype), target)
    return merged_variants(lowered)


@pytest.mark.parametrize(("name", "target", "precision", "calibrated"), [(*c, False) for c in CASES] + [("full", 120, p, True) for p in RECIPES] + [("full", 90, "fp8", True)])
def test_what_the_plans_launch_is_in_the_list(name: str, target: int, precision: str, calibrated: bool) -> None:
    found, known = planned(WORLDS[name], target, precision, calibrated), listed(name, target)
    assert not sorted(set(found) - set(known))
    assert {n: v for n, v in found.items() if known[n] != v} == {}


def test_a_name_means_one_signature_on_all_targets() -> None:
    signatures: dict[str, Any] = {}
    for target in TARGETS:
        for name, variant in listed("full", target).items():
            assert signatures.setdefault(name, (variant.kernel, variant.signature)) == (variant.kernel, variant.signature), name


BF16, FP8, ROWS = Operand("bf16"), Operand("fp8"), Operand("fp8", row_scales=True)
FP4, SWIZZLED = Operand("nvfp4"), Operand("nvfp4", swizzled=True)
TILE, PAIR, CONFIG = Tile(64, 64, 4, 2), PairTile(2, 128, 3, 2, True, True), Config(128, 128, 64)
FINISHES = [
    Finish(), Finish(out="fp32"), Finish(bias=True), Finish(bias=True, weight="fp32"), Finish(silu=True), Finish(add=True), Finish(gate=True),
    Finish(frame_gate="bf16"), Finish(frame_gate="fp32"), Finish(residual=True), Finish(extra=True), Finish(squares=True), Finish(quant="fp8"),
    Finish(quant="fp8", keep=False), Finish(quant="nvfp4"), Finish(quant="nvfp4", swizzled=True), Finish(glu=True),
]  # fmt: skip
QUANTIZED: dict[str, list[Any]] = {"quant": [None, "fp8", "nvfp4"], "keep": [True, False], "swizzled": [False, True]}
Axes = dict[str, list[Any]]
# A specialisation and the values of each of its parameters; the first ones are the base from which one or two are changed.
FAMILIES: dict[str, tuple[Callable[..., Any], Axes]] = {
    "update_rows": (plans.update_rows, {
        "kind": ["bf16", "fp32"], "channels": [64, 96], "tokens": [4, 6], "modulate": [True, False], "branch": [False, True], "gate": [False, True],
        "extra": [False, True], "modulation": ["bf16", "fp32"], "eps": [1e-6, 1e-5], "quant": [None, "fp8", "fp8_rows", "nvfp4"],
        "keep": [True, False], "swizzled": [False, True],
    }),
    "gate_rows": (plans.gate_rows, {"kind": ["bf16", "fp32"], "channels": [64, 96], "camera": [True, False], **QUANTIZED}),
    "norm_rows": (plans.norm_rows, {"kind": ["bf16", "fp32"], "weight": ["bf16", "fp32"], "channels": [64, 96], "eps": [1e-6, 1e-5]}),
    "depthwise": (block_plans.depthwise_glu, {
        "kind": ["bf16", "fp32"], "weight": ["bf16", "fp32"], "height": [4, 6], "width": [4, 6], "gated": [64, 96], **QUANTIZED,
    }),
    "depthwise_hopper": (block_plans.depthwise_glu_hopper, {
        "weight": ["bf16", "fp32"], "height": [4, 6], "width": [8, 16], "gated": [64, 128], "quant": [None, "fp8"], "keep": [True, False],
    }),
    "rope_heads": (block_plans.rope_heads, {
        "kind": ["bf16", "fp32"], "weight": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32], "tokens": [4, 60], "eps": [1e-5, 1e-6],
        "fp8": [False, True],
    }),
    "ucpe_heads": (block_plans.ucpe_heads, {
        "kind": ["bf16", "fp32"], "weight": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32], "tokens": [4, 60], "rays": [4, 8],
        "eps": [1e-5, 1e-6], "clamp": [False, True], "fp8": [False, True],
    }),
    "inverse_ucpe": (block_plans.inverse_ucpe, {"kind": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32], "tokens": [4, 60], "rays": [4, 8]}),
    "transpose_values": (block_plans.transpose_values, {"kind": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32]}),
    "window": (attention.window_attention, {
        "kind": ["bf16", "fp32", "fp8e4nv"], "heads": [2, 3], "width": [16, 32], "segments": [1, 2, 3], "tile": [TILE], "out": [None, "fp32", "fp16"],
        "ucpe": [False, True], "rays_batched": [0, 8], **QUANTIZED,
    }),
    "pair": (attention.window_pair, {"heads": [2, 3], "width": [16, 32], "segments": [1, 2, 3], "tile": [PAIR]}),
    "pair_finish": (attention.finish_pair, {"heads": [2, 3], "width": [16, 32], "segments": [1, 2, 3], "tile": [PAIR], **QUANTIZED}),
    "cross": (attention.cross_attention, {
        "kind": ["bf16", "fp32"], "weight": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32], "eps": [1e-6, 1e-5], "tile": [TILE],
        "parts": [0, 4, 5], **QUANTIZED,
    }),
    "cross_roles": (attention.cross_roles, {
        "weight": ["bf16", "fp32"], "heads": [2, 3], "width": [16, 32], "keys": [12, 300], "eps": [1e-6, 1e-5], "parts": [4, 5],
    }),
    "gemm": (lambda operands, **rest: gemm.gemm(*operands, **rest), {
        "operands": [(BF16, BF16), (FP8, FP8), (FP8, ROWS), (ROWS, ROWS), (FP4, FP4), (SWIZZLED, SWIZZLED)], "columns": [64, 96], "depth": [64, 128],
        "tokens": [4, 6], "finish": FINISHES, "config": [CONFIG],
    }),
    "first tap": (lambda operands, **rest: gemm.gemm(*operands, **rest), {
        "operands": [(BF16, BF16), (FP8, FP8), (FP8, ROWS), (FP4, FP4)], "columns": [64, 96], "depth": [64, 128], "tokens": [4],
        "finish": FINISHES[:1], "config": [CONFIG], "pitch": [None, 192, 384],
    }),
    "temporal": (lambda operands, **rest: gemm.temporal_conv(*operands, **rest), {
        "operands": [(BF16, BF16), (FP8, FP8), (FP8, ROWS), (FP4, FP4)], "columns": [64, 96], "channels": [64, 128], "frame": [4, 6],
        "batch": [12, 24], "carried": [True, False], "finish": FINISHES[5:6] + FINISHES[7:10], "config": [CONFIG],
    }),
    "epilogue": (gemm.epilogue, {"columns": [64, 96], "tokens": [4, 6], "kind": ["bf16", "fp32"], "finish": FINISHES}),
    "transpose": (chunk.transpose, {"kind": ["bf16", "fp32"], "out": ["bf16", "fp32"]}),
    "modulation_rows": (chunk.modulation_rows, {"kind": ["bf16", "fp32"], "steps": [5, 6]}),
    "rays": (chunk.ray_matrices, {"height": [4, 6], "width": [4, 6]}),
    "rope_table": (chunk.rope_table, {"height": [4, 6], "width": [4, 6], "pairs": [(8, 4, 4), (6, 5, 5)], "keep": [(4, 2, 2), (2, 3, 3)]}),
    "gelu": (chunk.gelu, {"kind": ["bf16", "fp32"]}),
    "euler": (chunk.euler_step, {"kind": ["bf16", "fp32"], "frames": [3, 4], "tokens": [4, 6]}),
    "latent_rows": (conv.latent_rows, {"kind": ["bf16", "fp32"]}),
    "norm_silu": (conv.norm_silu, {"kind": ["bf16", "fp32"], "channels": [64, 96], "state": [False, True]}),
    "causal_conv": (conv.causal_conv, {
        "kind": ["bf16", "fp32"], "target": [90], "frames": [1, 2], "height": [4, 6], "width": [4, 6], "channels": [64, 96], "out_channels": [48, 64],
        "mode": ["plain", "residual", "upsample"], "first": [False, True], "patch": [4],
    }),
    "described_conv": (conv.described_conv, {
        "kind": ["bf16", "fp32"], "frames": [1, 2], "height": [4, 6], "width": [4, 6], "channels": [64, 96], "out_channels": [48, 64],
        "mode": ["plain", "residual", "upsample"], "first": [False, True], "patch": [4],
        "tile": [conv.Config(128, 128, 32), conv.Config(128, 128, 32, splits=3)],
    }),
    "padded": (conv.padded, {
        "kind": ["bf16", "fp32"], "frames": [1, 2], "height": [4, 6], "width": [4, 6], "channels": [64, 96], "first": [False, True],
        "norm": [False, True],
    }),
    "padded_latent": (conv.padded_latent, {
        "kind": ["bf16", "fp32"], "height": [4, 6], "width": [4, 6], "channels": [64, 96], "first": [False, True],
    }),
    "summed": (conv.summed, {
        "kind": ["bf16", "fp32"], "rows": [256, 512], "out_channels": [48, 64], "splits": [3, 9], "residual": [False, True],
    }),
    "selection": (conv.selection, {"kind": ["bf16", "fp32"], "channels": [16, 64], "out_channels": [64, 96], "mode": ["residual", "upsample"]}),
    **{phase.__name__: (lambda phase=phase, **facts: phase(gdn.Problem(heads=2, head_dim=16, tokens=4, key_scale=0.1, **facts), 90), {
        "batch": [1, 2], "frames": [3, 4], "kind": ["bf16", "fp32"], "weight_kind": ["bf16", "fp32"], "gate_kind": ["bf16", "fp32"],
        "precision": ["bf16", "tf32", "ieee"], "has_state": [True, False], "commit": [True, False], "main": [True, False],
        "clamp": [False, True], "camera_carry": [True, False],
    }) for phase in gdn.PHASES},
}  # fmt: skip


def specialisations(make: Callable[..., Any], axes: Axes) -> list[KernelVariant]:
    """The base and everything one or two parameters away from it, where such a kernel exists."""
    base = {name: values[0] for name, values in axes.items()}
    changes = [{name: value} for name, values in axes.items() for value in values]
    found = []
    for first in changes:
        for second in changes:
            chosen = base | first | second
            # Nothing calls for rows that are neither kept nor quantized, or for a layout of scales that are not there.
            if "quant" in axes and ((chosen["quant"] is None and not chosen["keep"]) or (chosen.get("swizzled") and chosen["quant"] != "nvfp4")):
                continue
            try:
                found.append(make(**chosen))
            except ValueError:  # operands that do not go together
                continue
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_names_tell_specialisations_apart(family: str) -> None:
    known: dict[str, KernelVariant] = {}
    for variant in specialisations(*FAMILIES[family]):
        same = known.setdefault(variant.name, variant)
        assert (same.signature, same.constexprs) == (variant.signature, variant.constexprs), variant.name
    assert len(known) > 1

"""Products that the streaming model launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.gemm import plans
from sanawm_kernels.gemm.plans import Finish, Operand
from sanawm_kernels.gemm.table import default_config
from sanawm_kernels.tokenwise.variants import KIND, one_scale

# A merged projection's columns are padded to a multiple of this: 15,700 columns cost a GEMM library three times what 15,744 do.
MERGED_MULTIPLE = 64


def operands(target: int) -> list[tuple[Operand, Operand]]:
    """Formats of activations and weights on a target: bf16; FP8 with one scale, or one a row of both; NVFP4."""
    found = [(Operand(KIND), Operand(KIND))]
    if target >= 89:
        one, row = Operand("fp8"), Operand("fp8", row_scales=True)
        found += [(one, one), (one, row), (row, row)]
    if target >= plans.FP4_TARGETS[0]:
        fp4 = Operand("nvfp4", swizzled=target in (100, 103))
        found.append((fp4, fp4))
    return found


def padded(columns: int) -> int:
    """Columns of a merged projection with those that are added."""
    return -(-columns // MERGED_MULTIPLE) * MERGED_MULTIPLE


def merged_columns(sizes: ModelSizes) -> tuple[int, int]:
    """Columns of the projection of u: main and camera q, k, v, output gate; of a GDN block with its gates, and of a softmax block."""
    return padded(7 * sizes.hidden + 2 * sizes.heads), padded(7 * sizes.hidden)


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Every product of a block in every format, and the small products around the blocks in bf16."""
    found: dict[str, KernelVariant] = {}
    for a, b in operands(target):
        tokens = sizes.tokens_per_frame
        # The clean pass of the last block has a frame's rows.
        for (columns, depth, finish), frames in product(_block_products(sizes, target), (1, *sizes.frames)):
            config = default_config(target, a.kind, columns, finish, tokens=tokens, swizzled=a.swizzled, rows=frames * tokens)
            variant = plans.gemm(a, b, columns, depth, tokens, finish, config)
            found[variant.name] = variant
        if not a.row_scales:
            found |= {variant.name: variant for variant in _temporal(sizes, target, a, b)}
    for columns, depth in _outer_products(sizes):
        plain = Operand(KIND)
        finish = Finish(bias=True)
        variant = plans.gemm(plain, plain, columns, depth, sizes.tokens_per_frame, finish, default_config(target, KIND, columns, finish))
        found[variant.name] = variant
    for finish in (_residual(), Finish(bias=True, add=True, gate=True), Finish(bias=True, silu=True), Finish(residual=True)):
        variant = plans.epilogue(sizes.hidden, sizes.tokens_per_frame, KIND, finish)
        found[variant.name] = variant
    return list(found.values())


def emulated(sizes: ModelSizes) -> list[KernelVariant]:
    """The block's NVFP4 products for sm_90, which has no units for them: Triton from 3.9 on multiplies in bfloat16. For numerics, never for speed."""
    fp4, target = Operand("nvfp4"), plans.EMULATED_FP4
    recipe = {"quant": "nvfp4", "native": False}
    found: dict[str, KernelVariant] = {}
    for columns, depth, finish in _block_products(sizes, target, [recipe]):
        config = default_config(target, "nvfp4", columns, finish, tokens=sizes.tokens_per_frame)
        variant = plans.gemm(fp4, fp4, columns, depth, sizes.tokens_per_frame, finish, config)
        found[variant.name] = variant
    found |= {variant.name: variant for variant in _temporal(sizes, target, fp4, fp4)}
    return [replace(variant, targets=(target,), hot=False) for variant in found.values()]


def _residual(**outputs: Any) -> Finish:
    """x + gate of the frame * branch + Plücker product."""
    return Finish(bias=True, frame_gate=KIND, residual=True, extra=True, **outputs)


def _block_products(
    sizes: ModelSizes, target: int, recipes: Sequence[dict[str, Any]] | None = None
) -> Iterator[tuple[int, int, Finish]]:
    """Columns, depth and epilogue of each product; `recipes` are the formats of the outputs that are quantized."""
    C, G = sizes.hidden, sizes.glu_width
    recipes = one_scale(target) if recipes is None else recipes
    quantized = [{"keep": False, **recipe} for recipe in recipes]
    kept = [{**recipe, "keep": True} for recipe in recipes]
    # The projections of u: all together, and apart where formats differ (a recipe may give q, k and v, the camera's and the gate one each). Those
    # of the Plücker features and the text have C columns too.
    for columns in dict.fromkeys((*merged_columns(sizes), *(padded(n * C) for n in (6, 4, 3, 1)), C)):
        yield columns, C, Finish(bias=True)
    for outputs in ({}, *quantized):
        yield C, C, Finish(bias=True, add=True, gate=True, **outputs)  # camera output, sum of branches, output gate
    for outputs in ({}, *kept):
        yield C, C, _residual(**outputs)  # self-attention output into the stream
    yield C, C, Finish(bias=True, squares=True)  # cross-attention queries
    yield C, C, Finish(bias=True, residual=True)  # cross-attention output into the stream
    yield 2 * G, C, Finish(bias=True, silu=True)  # FFN in
    for outputs in ({}, *kept):
        yield C, G, Finish(**outputs)  # FFN out; plain rows too, for the temporal convolution's residual


def _temporal(sizes: ModelSizes, target: int, a: Operand, b: Operand) -> Iterator[KernelVariant]:
    """Temporal convolution: first and later chunks of every length, and what they carry. NVFP4 scales come in rows: frames do not start at tiles."""
    a, b = (Operand(x.kind, x.row_scales) for x in (a, b))
    finish = Finish(add=True, frame_gate=KIND, residual=True)
    for frames in sizes.frames:
        for carried in (False, True):
            tokens = sizes.tokens_per_frame
            config = default_config(target, a.kind, sizes.hidden, finish, tokens=tokens, taps=3)
            yield plans.temporal_conv(a, b, sizes.hidden, sizes.hidden, tokens, frames * tokens, carried, finish, config)
    config = default_config(target, a.kind, sizes.hidden)
    yield plans.gemm(a, b, sizes.hidden, sizes.hidden, sizes.tokens_per_frame, Finish(), config, 3 * sizes.hidden)


def _outer_products(sizes: ModelSizes) -> list[tuple[int, int]]:
    C = sizes.hidden
    return [
        (C, sizes.latent_channels),
        (C, sizes.plucker_channels),
        (sizes.latent_channels, C),
        (C, sizes.caption_channels),
        (2 * C, C),
        (C, C),
        (padded(2 * sizes.heads), C),
    ]

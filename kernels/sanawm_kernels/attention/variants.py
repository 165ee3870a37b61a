"""Attention kernels that the streaming model launches."""

from __future__ import annotations

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.attention import plans, table
from sanawm_kernels.gemm.plans import Finish
from sanawm_kernels.gemm.table import default_config
from sanawm_kernels.tokenwise.variants import CROSS_NORM_EPS, KIND, one_scale


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Window attention of both branches over one to three segments, in bf16 and FP8, apart and together, and cross-attention."""
    H, D = sizes.heads, sizes.head_dim
    found = []
    # No cache, the sink alone, the sink and the chunk before.
    for segments in range(1, min(len(sizes.cached), 3) + 1):
        for kind in ("bf16", "fp8e4nv") if target >= 89 else ("bf16",):
            tile = table.tile("window", target, kind)
            batched = {"rays_batched": 0}
            found += [plans.window_attention(kind, H, D, segments, tile, out=KIND, ucpe=ucpe, **batched) for ucpe in (False, True)]
            if target >= 89:
                # The camera branch's output is an operand of the next product.
                found.append(plans.window_attention(kind, H, D, segments, tile, out=KIND, ucpe=True, quant="fp8", keep=False, **batched))
        if table.paired(target, KIND):
            pair = table.pair_tile(target)
            found += [plans.window_pair(H, D, segments, pair), plans.finish_pair(H, D, segments, pair)]
            found.append(plans.finish_pair(H, D, segments, pair, quant="fp8", keep=False))
    parts = -(-sizes.hidden // default_config(target, KIND, sizes.hidden, Finish(squares=True)).squares_width)
    if plans.roles_fit(target, KIND, D, sizes.text_tokens, parts, None, 1):
        found.append(plans.cross_roles(KIND, H, D, sizes.text_tokens, CROSS_NORM_EPS, parts))
    for recipe in [{}, *one_scale(target)]:
        tile = table.tile("cross", target, KIND, recipe.get("quant"))
        for measured in (parts, 0):
            found.append(plans.cross_attention(KIND, KIND, H, D, CROSS_NORM_EPS, tile, parts=measured, keep=not recipe, **recipe))
    return found

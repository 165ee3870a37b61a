"""Token-wise kernels that the streaming model launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.tokenwise import block_plans, plans

KIND = "bf16"
NORM_EPS, CROSS_NORM_EPS = 1e-5, 1e-6


def recipes(target: int) -> list[dict[str, Any]]:
    """Forms of quantized rows a target's products take: FP8 with one or a row's scale, NVFP4 with scales as its products read them."""
    found: list[dict[str, Any]] = []
    if target >= 89:
        found += [{"quant": "fp8"}, {"quant": "fp8_rows"}]
    if target >= plans.NATIVE_FP4:
        # tcgen05 reads swizzled scales; the RTX architectures read rows.
        found += [{"quant": "nvfp4", "swizzled": target in (100, 103), "native": True}]
    return found


def one_scale(target: int) -> list[dict[str, Any]]:
    """The same for kernels whose programs do not see whole rows."""
    return [recipe for recipe in recipes(target) if recipe["quant"] != "fp8_rows"]


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Norms, residuals, gates, depthwise convolution and head transforms, for every chunk length and number format."""
    return [*_rows(sizes, target), *_blocks(sizes, target), *_heads(sizes, target)]


def _rows(sizes: ModelSizes, target: int) -> Iterator[KernelVariant]:
    C, S = sizes.hidden, sizes.tokens_per_frame
    residuals: list[dict[str, bool]] = [{}, {"branch": True, "gate": True}, {"branch": True, "gate": True, "extra": True}, {"branch": True}]
    for residual in residuals:
        yield plans.update_rows(KIND, C, S, modulate=True, **residual)
        for recipe in recipes(target):
            yield plans.update_rows(KIND, C, S, modulate=True, keep=False, **residual, **recipe)
            # The gates of a GDN block read the plain rows too.
            yield plans.update_rows(KIND, C, S, modulate=True, keep=True, **residual, **recipe)
        if residual:
            yield plans.update_rows(KIND, C, S, **residual)
    yield plans.update_rows(KIND, C, S, extra=True)
    for recipe in recipes(target):
        yield plans.update_rows(KIND, C, S, keep=False, **recipe)
        yield plans.update_rows(KIND, sizes.glu_width, S, keep=False, **recipe)
    yield plans.gate_rows(KIND, C)
    for recipe in recipes(target):
        yield plans.gate_rows(KIND, C, keep=False, **recipe)
    for eps in (NORM_EPS, CROSS_NORM_EPS):
        yield plans.norm_rows(KIND, KIND, C, eps)


def _blocks(sizes: ModelSizes, target: int) -> Iterator[KernelVariant]:
    grid = (sizes.height, sizes.width, sizes.glu_width)
    yield block_plans.depthwise_glu(KIND, KIND, *grid)
    for recipe in one_scale(target):
        yield block_plans.depthwise_glu(KIND, KIND, *grid, keep=False, **recipe)
    for quant in (None, "fp8"):
        if block_plans.hopper_fits(target, KIND, sizes.width, sizes.glu_width, 2 * sizes.glu_width, quant):
            yield block_plans.depthwise_glu_hopper(KIND, *grid, keep=quant is None, quant=quant)


def _heads(sizes: ModelSizes, target: int) -> Iterator[KernelVariant]:
    H, D = sizes.heads, sizes.head_dim
    for frames in sizes.frames:
        tokens = frames * sizes.tokens_per_frame
        for fp8 in (False, True):
            yield block_plans.rope_heads(KIND, KIND, H, D, tokens, NORM_EPS, fp8)
            yield block_plans.ucpe_heads(KIND, KIND, H, D, tokens, tokens, NORM_EPS, sizes.rms_clamp, fp8)
        yield block_plans.inverse_ucpe(KIND, H, D, tokens, tokens)
    if target >= 89:
        yield block_plans.transpose_values(KIND, H, D)

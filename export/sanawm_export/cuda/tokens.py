"""Token-wise operations on the tape: normalisation, modulation, gates, depthwise convolution, head transforms."""

from __future__ import annotations

from dataclasses import replace

from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.products import quantized_rows, tile_quantization
from sanawm_export.cuda.tape import row_stride
from sanawm_kernels.tokenwise import block_plans, plans
from sanawm_runtime.engines._cuda_plan import View


def modulate(ctx: Context, label: str, x: View, shift: View, scale: View, product: str, *, keep: bool = False) -> Rows:
    """LayerNorm and modulation by one row of shift and scale a frame, in the form that `product` takes; `keep` asks for plain rows as well."""
    M, C = x.shape
    done, fill, parameters = quantized_rows(ctx, label, M, C, product)
    stored = keep or done.quant is None
    out = ctx.tensor(label, M, C) if stored else None
    variant = plans.update_rows(ctx.kind, C, M // shift.shape[0], modulate=True, keep=stored, **parameters)
    rows = {"shift": shift, "shift_row": row_stride(shift), "scale": scale, "scale_row": row_stride(scale)}
    bindings = {"x": x, "x_row": row_stride(x), **rows, "out": out}
    ctx.tape.launch(label, variant, bindings | fill, ("out", "codes", "scales"), ROWS=M)
    return replace(done, plain=out)


def rms_norm(ctx: Context, label: str, x: View, weight: View, eps: float, out: View | None = None) -> View:
    """RMS norm of rows."""
    variant = plans.norm_rows(ctx.kind, ctx.kind, x.shape[1], eps)
    result = out or ctx.tensor(label, *x.shape)
    ctx.tape.launch(label, variant, {"x": x, "x_row": row_stride(x), "weight": weight, "out": result}, ("out",), ROWS=x.shape[0])
    return result


def depthwise_glu(ctx: Context, label: str, x: View, block: str, frames: int, product: str) -> Rows:
    """Depthwise 3x3 of every frame and gated linear unit, (M, 2G) -> (M, G), quantized for `product` where a tile can."""
    M, G, c = x.shape[0], x.shape[1] // 2, ctx.config
    done, fill, parameters = tile_quantization(ctx, label, M, G, product)
    out = ctx.tensor(label, M, G) if done.quant is None else None
    row = row_stride(x)
    variant = block_plans.depthwise_glu_for(ctx.target, ctx.kind, ctx.kind, c.height, c.width, G, row, keep=done.quant is None, **parameters)
    bindings = {"x": x, "x_row": row, "taps": ctx.weight(f"{block}.taps"), "bias": ctx.weight(f"{block}.taps.bias"), "out": out}
    ctx.tape.launch(label, variant, bindings | fill, ("out", "codes", "scales"), flops=2 * M * 2 * G * 9, unit="fp32", FRAMES=frames)
    return replace(done, plain=out)

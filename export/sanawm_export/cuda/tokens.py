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


def gate_logits(ctx: Context, label: str, u: View, block: str, frames: int, beta: View | None) -> tuple[View, View]:
    """Logits of a frame's decay from its mean token, (frames, H) float32, and of each token's write strength, (M, H).

    The write strengths are those of the merged projection where it has them (`beta`), else they are computed in the same launch.
    """
    M, C = u.shape
    H = ctx.config.heads
    tiles = block_plans.gate_tiles(ctx.kind, ctx.kind, C, H, M // frames, beta is None)
    means = block_plans.gate_means(ctx.kind, H, M // frames, beta is None)
    with ctx.tape.group():
        partial = ctx.tensor(f"{label}.partial", frames, means.constexprs["SHARES"], means.constexprs["BH"], dtype="float32")
        out = ctx.tensor(label, frames, H, dtype="float32")
        weight, bias = ctx.weight(f"{block}.decay.weight"), ctx.weight(f"{block}.decay.bias")
        bindings = {"u": u, "u_row": row_stride(u), "decay_weight": weight, "partial": partial}
        products = 1
        if beta is None:
            beta, products = ctx.tensor("beta", M, H), 2
            bindings |= {"beta": beta, "beta_weight": ctx.weight(f"{block}.beta.weight"), "beta_bias": ctx.weight(f"{block}.beta.bias")}
        ctx.tape.launch(f"{label}.tiles", tiles, bindings, ("partial", "beta"), flops=products * 2 * M * C * H, unit=ctx.kind, FRAMES=frames)
        ctx.tape.launch(label, means, {"partial": partial, "decay_bias": bias, "out": out}, ("out",), FRAMES=frames)
    return out, beta


def depthwise_glu(ctx: Context, label: str, x: View, block: str, frames: int, product: str) -> Rows:
    """Depthwise 3x3 of every frame and gated linear unit, (M, 2G) -> (M, G), quantized for `product` where a tile can."""
    M, G, c = x.shape[0], x.shape[1] // 2, ctx.config
    done, fill, parameters = tile_quantization(ctx, label, M, G, product)
    out = ctx.tensor(label, M, G) if done.quant is None else None
    variant = block_plans.depthwise_glu(ctx.kind, ctx.kind, c.height, c.width, G, keep=done.quant is None, **parameters)
    bindings = {"x": x, "x_row": row_stride(x), "taps": ctx.weight(f"{block}.taps"), "bias": ctx.weight(f"{block}.taps.bias"), "out": out}
    ctx.tape.launch(label, variant, bindings | fill, ("out", "codes", "scales"), flops=2 * M * 2 * G * 9, unit="fp32", FRAMES=frames)
    return replace(done, plain=out)

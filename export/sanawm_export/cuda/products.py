"""Matrix products on the tape, and the quantization of their operands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.formats import Format
from sanawm_export.cuda.tape import row_stride
from sanawm_kernels.gemm import plans
from sanawm_kernels.gemm.plans import Finish, Operand
from sanawm_kernels.gemm.table import MULTIPROCESSORS, default_config
from sanawm_kernels.tokenwise import plans as rows
from sanawm_kernels.tokenwise.plans import NATIVE_FP4
from sanawm_runtime.engines._cuda_plan import View


def operand_of(quant: str | None, kind: str) -> Operand:
    """How a product takes activations quantized that way."""
    return {None: Operand(kind), "fp8": Operand("fp8"), "fp8_rows": Operand("fp8", row_scales=True), "nvfp4": Operand("nvfp4")}[quant]


def quantized_rows(ctx: Context, name: str, M: int, K: int, product: str) -> tuple[Rows, dict[str, Any], dict[str, Any]]:
    """Tensors for rows quantized as `product` takes them, the kernel arguments that fill them, and the plan's parameters."""
    layout = ctx.weights.formats.of(product)
    quant = layout.quant
    if quant is None:
        return Rows(None), {}, {"quant": None}
    native = {"quant": quant, "native": ctx.target >= NATIVE_FP4}
    width, dtype = (K // 2, "uint8") if quant == "nvfp4" else (K, "float8_e4m3fn")
    codes = ctx.tensor(f"{name}.codes", M, width, dtype=dtype)
    scales = scale = None
    if quant == "fp8_rows":
        scales = ctx.tensor(f"{name}.scales", M, dtype="float32")
    else:
        scale = ctx.weight(f"{product}.input_scale")
    if quant == "nvfp4":
        scales = ctx.tensor(f"{name}.blocks", M, K // 16, dtype="float8_e4m3fn")
    return Rows(None, quant, codes, scales, scale), {"codes": codes, "scales": scales, "quant_scale": scale}, native


def quantize(ctx: Context, label: str, x: View, product: str) -> Rows:
    """Rows in the form that `product` takes: as they are, or with a launch that quantizes them."""
    M, K = x.shape
    done, arguments, parameters = quantized_rows(ctx, f"{label}.input", M, K, product)
    if done.quant is None:
        return Rows(x)
    variant = rows.update_rows(ctx.kind, K, M, keep=False, **parameters)
    ctx.tape.launch(f"{label}.quantize", variant, {"x": x, "x_row": row_stride(x), **arguments}, ("codes", "scales"), ROWS=M)
    return Rows(x, done.quant, done.codes, done.scales, done.scale)


def as_operand(ctx: Context, label: str, x: Rows, product: str) -> Rows:
    """`x` in the form that `product` takes, quantized by a launch of its own where the kernel before could not."""
    if ctx.weights.formats.of(product).quant == x.quant:
        return x
    return quantize(ctx, label, x.values, product)


class Forms:
    """Rows in the forms that several products take, each form made once. `rows` is in the form of `made_for`, or plain."""

    def __init__(self, ctx: Context, rows: Rows, made_for: str | None = None) -> None:
        self._ctx = ctx
        self._plain = rows.plain
        self._made = {} if made_for is None else {_form(ctx.weights.formats.of(made_for)): rows}

    def of(self, label: str, product: str) -> Rows:
        """The rows as `product` takes them; a launch that quantizes them is named after `label`."""
        form = _form(self._ctx.weights.formats.of(product))
        if form not in self._made:
            self._made[form] = quantize(self._ctx, label, Rows(self._plain).values, product)
        return self._made[form]


def _form(layout: Format) -> tuple[str | None, float | None]:
    return layout.quant, layout.scale


def _a_arguments(x: Rows) -> dict[str, Any]:
    if x.quant is None:
        return {"a": x.values, "a_row": row_stride(x.values)}
    assert x.codes is not None
    blocks = x.scales if x.quant == "nvfp4" else None
    return {"a": x.codes, "a_row": row_stride(x.codes), "a_scales": blocks, "a_scale": x.scales if x.quant == "fp8_rows" else x.scale}


def _b_arguments(ctx: Context, name: str, rows_of: slice | None, taps: int = 1) -> dict[str, Any]:
    """Weight operands of a product, or of some of its rows, or of the first of the `taps` in each row."""

    def part(view: View) -> View:
        view = view if rows_of is None else view.narrow(0, rows_of.start, rows_of.stop - rows_of.start)
        return view if taps == 1 or len(view.shape) == 1 else view.narrow(1, 0, view.shape[1] // taps)

    layout = ctx.weights.formats.of(name)
    if layout.kind == "plain":
        return {"b": part(ctx.weight(f"{name}.weight"))}
    if layout.kind == "fp8":
        scales = ctx.weight(f"{name}.scales")
        return {"b": part(ctx.weight(f"{name}.codes")), "b_scale": scales if layout.calibrated else part(scales)}
    return {"b": part(ctx.weight(f"{name}.codes")), "b_scales": part(ctx.weight(f"{name}.blocks")), "b_scale": ctx.weight(f"{name}.global")}


def _b_operand(ctx: Context, name: str) -> Operand:
    layout = ctx.weights.formats.of(name)
    return {"plain": Operand(ctx.kind), "fp8": Operand("fp8", row_scales=not layout.calibrated), "nvfp4": Operand("nvfp4")}[layout.kind]


def _unit(ctx: Context, name: str) -> str:
    kind = ctx.weights.formats.of(name).kind
    return ctx.kind if kind == "plain" else kind


def _finish_arguments(finish: Mapping[str, View]) -> dict[str, Any]:
    return dict(finish) | {f"{name}_row": row_stride(view) for name, view in finish.items()}


def parts_of_squares(ctx: Context, name: str, columns: int) -> int:
    """Partial sums of squares a row that the product's epilogue writes."""
    config = default_config(ctx.target, _unit(ctx, name), columns, Finish(out=ctx.kind, squares=True))
    return math.ceil(columns / config.squares_width)


def product(
    ctx: Context,
    label: str,
    name: str,
    x: Rows,
    *,
    out: View | None = None,
    rows_of: slice | None = None,
    silu: bool = False,
    squares: View | None = None,
    quantize_for: str | None = None,
    keep: bool = True,
    tokens: int = 1,
    taps: int = 1,
    **operands: View,
) -> Rows:
    """x @ weight^T with the weight `name`, its bias if it has one, and an epilogue.

    `operands` are the epilogue's (add, gate, frame_gate, residual, extra), (M, columns) each or (frames, columns) for frame_gate, whose rows
    serve `tokens` rows. `quantize_for` names the product that reads the result next: where a tile can, the epilogue quantizes for it, and with
    `keep` false stores nothing else. `rows_of` takes some of the weight's rows, and where these hold several `taps` the product is with the first.
    """
    x = as_operand(ctx, label, x, name)
    b = _b_arguments(ctx, name, rows_of, taps)
    M, columns = (x.plain or x.codes).shape[0], b["b"].shape[0]  # type: ignore[union-attr]
    depth = b["b"].shape[1] * (2 if x.quant == "nvfp4" else 1)
    bias = ctx.weight(f"{name}.bias") if ctx.has(f"{name}.bias") else None
    if bias is not None and rows_of is not None:
        bias = bias.narrow(0, rows_of.start, columns)
    done, fill, parameters = tile_quantization(ctx, label, M, columns, quantize_for)
    stored = keep or done.quant is None
    result = (ctx.tensor(label, M, columns) if out is None else out) if stored else None
    frame_gate = operands.get("frame_gate")
    finish = Finish(
        out=ctx.kind, keep=stored, bias=bias is not None, silu=silu, add="add" in operands, gate="gate" in operands,
        frame_gate=None if frame_gate is None else ctx.kind, residual="residual" in operands, extra="extra" in operands, squares=squares is not None,
        weight=ctx.kind, **parameters,
    )  # fmt: skip
    unit = _unit(ctx, name)
    config = default_config(ctx.target, unit, columns, finish, tokens=tokens, rows=M)
    pitch = None if taps == 1 else taps * depth
    variant = plans.gemm(operand_of(x.quant, ctx.kind), _b_operand(ctx, name), columns, depth, tokens, finish, config, pitch)
    bindings = {**_a_arguments(x), **b, "bias": bias, **_finish_arguments(operands), "out": result, "squares": squares, **fill, "M": M}
    written = ("out", "codes", "scales", "squares")
    ctx.tape.launch(label, variant, bindings, written, flops=2 * M * columns * depth, unit=unit, **_sizes(config, ctx.target))
    return Rows(result, done.quant, done.codes, done.scales, done.scale)


def tile_quantization(
    ctx: Context, label: str, M: int, columns: int, quantize_for: str | None
) -> tuple[Rows, dict[str, Any], dict[str, Any]]:
    """`quantized_rows` by a kernel whose programs see parts of a row.

    Nothing where the next product takes plain rows, or rows scaled one by one, which no tile can make.
    """
    if quantize_for is None or ctx.weights.formats.of(quantize_for).quant in (None, "fp8_rows"):
        return Rows(None), {}, {}
    return quantized_rows(ctx, label, M, columns, quantize_for)


def temporal_product(
    ctx: Context, label: str, name: str, x: Rows, carried: View | None, frame: int, *, add: View, frame_gate: View, residual: View
) -> View:
    """The FFN's temporal convolution with what follows it: residual + frame_gate * (add + conv(x)); x (M, C), `frame` tokens a frame.

    `carried` (frame, C) are the products of the frame before the first one with the first tap: `product(..., taps=3)` of that frame.
    """
    M, C = add.shape
    x = as_operand(ctx, label, x, name)
    unit, finish = _unit(ctx, name), Finish(out=ctx.kind, add=True, frame_gate=ctx.kind, residual=True, weight=ctx.kind)
    config = default_config(ctx.target, unit, C, finish, tokens=frame, taps=3)
    variant = plans.temporal_conv(operand_of(x.quant, ctx.kind), _b_operand(ctx, name), C, C, frame, M, carried is not None, finish, config)
    out = ctx.tensor(label, M, C)
    operands = {"add": add, "frame_gate": frame_gate, "residual": residual} | ({} if carried is None else {"carried": carried})
    bindings = {**_a_arguments(x), **_b_arguments(ctx, name, None), **_finish_arguments(operands), "out": out, "M": M}
    # Nothing comes before the first frame and after the last one.
    flops = 2 * M * C * 3 * C - 2 * 2 * frame * C * C
    ctx.tape.launch(label, variant, bindings, ("out",), flops=flops, unit=unit, **_sizes(config, ctx.target))
    return out


def _sizes(config: plans.Config, target: int) -> dict[str, Any]:
    """What the grid of a product needs beside its arguments."""
    return {"SMS": MULTIPROCESSORS[target]} if config.persistent else {}

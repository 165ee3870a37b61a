"""Triton kernels over whole rows: residual update, LayerNorm with modulation, output gate, RMS norm, quantization of rows.

A program has R tokens' C channels in registers, each token's as a tile of C0 channels (the largest power of two within C) and one of C1: 2240 = 2048
+ 192, of which 3 % is masked, where a single tile of 4096 would leave 45 % of its lanes idle. All rows are asked for before the first sum waits for
one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import FP8_ROWS, NO_CODES, store_row


@triton.jit
def _channels(C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Of both tiles the channels and which of them exist; without C1 the second is a stand-in."""
    columns_a = tl.arange(0, C0)
    columns_b = C0 + tl.arange(0, C1 if C1 > 0 else 16)
    return columns_a, columns_b, columns_a < C, columns_b < C


@triton.jit
def _total(a, b, C1: tl.constexpr, LANES: tl.constexpr):
    """Sum of both tiles: one reduction over the program's LANES threads, where each has elements of both."""
    if C1 >= LANES:
        mine = tl.sum(tl.reshape(a, (LANES, a.shape[0] // LANES), can_reorder=True), 1)
        mine += tl.sum(tl.reshape(b, (LANES, C1 // LANES), can_reorder=True), 1)
        return tl.sum(mine, 0)
    elif C1 > 0:
        return tl.sum(a, 0) + tl.sum(b, 0)
    else:
        return tl.sum(a, 0)


@triton.jit
def _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, row, frame, column, inside, C: tl.constexpr):
    """The residual stream of one tile after the update, rounded as it is stored."""
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    if updated is not None:
        total = value.to(tl.float32)
        if branch is not None:
            update = tl.load(branch + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                update *= tl.load(gate + frame * gate_row + column, mask=inside, other=0.0).to(tl.float32)
            total += update
        if extra is not None:
            total += tl.load(extra + row * extra_row + column, mask=inside, other=0.0).to(tl.float32)
        value = total.to(updated.dtype.element_ty)
        tl.store(updated + row * C + column, value, mask=inside)
    return value


@triton.jit
def _modulation(shift, shift_row, scale, scale_row, frame, column, inside):
    """Shift and scale of a frame as they are stored."""
    return tl.load(shift + frame * shift_row + column, mask=inside, other=0.0), tl.load(scale + frame * scale_row + column, mask=inside, other=0.0)


@triton.jit
def _modulated(centred, inverse, modulation, like):
    """centred * inverse * (1 + scale) + shift, rounded to the dtype of `like`, in float32."""
    value = centred * inverse * (1.0 + modulation[1].to(tl.float32)) + modulation[0].to(tl.float32)
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _finish(
    a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store both tiles plain, quantized, or both; what lies outside a row is 0."""
    if out is not None:
        tl.store(out + row * C + columns_a, a.to(out.dtype.element_ty), mask=inside_a)
        if C1 > 0:
            tl.store(out + row * C + columns_b, b.to(out.dtype.element_ty), mask=inside_b)
    if QUANT != NO_CODES:
        if QUANT == FP8_ROWS:
            amax = tl.max(tl.abs(a), 0)
            if C1 > 0:
                amax = tl.maximum(amax, tl.max(tl.abs(b), 0))
            scale = tl.where(amax > 0.0, tl.maximum(tl.math.div_rn(amax, 448.0), 1.1754943508222875e-38), 1.0)
            tl.store(scales + row, scale)
        else:
            scale = tl.load(quant_scale)
        store_row(a, codes, scales, scale, row, 0, C // 16, inside_a, C0, QUANT, SWIZZLED, NATIVE)
        if C1 > 0:
            store_row(b, codes, scales, scale, row, C0, C // 16, inside_b, C1, QUANT, SWIZZLED, NATIVE)


@triton.jit
def update_rows(
    x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, shift, shift_row, scale, scale_row,
    updated, out, codes, scales, quant_scale,
    TOKENS: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows / R). updated = x + gate * branch + extra; then, with `shift`, LayerNorm and modulation; then stores.

    Absent operands and outputs are None. TOKENS rows, a multiple of R, share one row of gate, shift and scale.
    """
    first = tl.program_id(0).to(tl.int64) * R
    frame = first // TOKENS
    columns_a, columns_b, inside_a, inside_b = _channels(C, C0, C1)
    rows_a, rows_b = (), ()
    for i in tl.static_range(R):
        a = _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, first + i, frame, columns_a, inside_a, C)
        rows_a = rows_a + (a,)  # type: ignore[assignment] # noqa: RUF005
        if C1 > 0:
            a = _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, first + i, frame, columns_b, inside_b, C)
        rows_b = rows_b + (a,)  # type: ignore[assignment] # noqa: RUF005
    if shift is not None:
        modulation_a = _modulation(shift, shift_row, scale, scale_row, frame, columns_a, inside_a)
        modulation_b = modulation_a
        if C1 > 0:
            modulation_b = _modulation(shift, shift_row, scale, scale_row, frame, columns_b, inside_b)
    for i in tl.static_range(R):
        a, b = rows_a[i].to(tl.float32), rows_b[i].to(tl.float32)  # type: ignore[misc,var-annotated]
        if shift is not None:
            mean = _total(a, b, C1, LANES) / C
            # Deviations from the mean rather than a difference of moments: rows with a large common offset keep their digits.
            a, b = tl.where(inside_a, a - mean, 0.0), tl.where(inside_b if C1 > 0 else inside_a, b - mean, 0.0)
            inverse = tl.math.rsqrt(_total(a * a, b * b, C1, LANES) / C + EPS)
            a, b = _modulated(a, inverse, modulation_a, x), _modulated(b, inverse, modulation_b, x)
        _finish(a, b, first + i, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b, C, C0, C1, QUANT, SWIZZLED, NATIVE)


@triton.jit
def _gated(main, main_row, camera, camera_row, gate, gate_row, row, column, inside):
    value = tl.load(main + row * main_row + column, mask=inside, other=0.0).to(tl.float32)
    if camera is not None:
        value += tl.load(camera + row * camera_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    return (value * g * tl.sigmoid(g)).to(main.dtype.element_ty).to(tl.float32)


@triton.jit
def gate_rows(
    main, main_row, camera, camera_row, gate, gate_row, out, codes, scales, quant_scale,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows). (main + camera) * SiLU(gate), the product in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns_a, columns_b, inside_a, inside_b = _channels(C, C0, C1)
    a = _gated(main, main_row, camera, camera_row, gate, gate_row, row, columns_a, inside_a)
    b = a
    if C1 > 0:
        b = _gated(main, main_row, camera, camera_row, gate, gate_row, row, columns_b, inside_b)
    _finish(a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b, C, C0, C1, QUANT, SWIZZLED, NATIVE)


@triton.jit
def norm_rows(x, x_row, weight, out, LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr):
    """Grid (rows). Root-mean-square norm with weight."""
    row = tl.program_id(0).to(tl.int64)
    columns_a, columns_b, inside_a, inside_b = _channels(C, C0, C1)
    a = tl.load(x + row * x_row + columns_a, mask=inside_a, other=0.0).to(tl.float32)
    weight_a = tl.load(weight + columns_a, mask=inside_a, other=0.0)
    b, weight_b = a, weight_a
    if C1 > 0:
        b = tl.load(x + row * x_row + columns_b, mask=inside_b, other=0.0).to(tl.float32)
        weight_b = tl.load(weight + columns_b, mask=inside_b, other=0.0)
    inverse = tl.math.rsqrt(_total(a * a, b * b, C1, LANES) / C + EPS)
    tl.store(out + row * C + columns_a, (a * inverse * weight_a.to(tl.float32)).to(out.dtype.element_ty), mask=inside_a)
    if C1 > 0:
        tl.store(out + row * C + columns_b, (b * inverse * weight_b.to(tl.float32)).to(out.dtype.element_ty), mask=inside_b)

"""Triton kernels over whole rows: residual update, LayerNorm with modulation, output gate, RMS norm, quantization of rows.

One program has one token's C channels in registers, as a tile of C0 (the largest power of two within C) and one of C1: 2240 = 2048 + 192, of which
3 % is masked, where a single tile of 4096 would leave 45 % of its lanes idle.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import FP8_ROWS, NO_CODES, store_row


@triton.jit
def _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, row, frame, column, inside, C: tl.constexpr):
    """The residual stream of one tile after the update, rounded as it is stored, in float32."""
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        update = tl.load(branch + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            update *= tl.load(gate + frame * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        value += update
    if extra is not None:
        value += tl.load(extra + row * extra_row + column, mask=inside, other=0.0).to(tl.float32)
    if updated is not None:
        rounded = value.to(updated.dtype.element_ty)
        tl.store(updated + row * C + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _modulated(value, mean, inverse, shift, shift_row, scale, scale_row, like, frame, column, inside):
    """(value - mean) * inverse * (1 + scale) + shift, rounded to the dtype of `like`, in float32."""
    gain = 1.0 + tl.load(scale + frame * scale_row + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + frame * shift_row + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (value - mean) * inverse * gain + offset, 0.0).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _finish(
    a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store both tiles plain, quantized, or both."""
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
    TOKENS: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows). updated = x + gate * branch + extra; then, with `shift`, LayerNorm and modulation; then stores.

    Absent operands and outputs are None. TOKENS rows share one row of gate, shift and scale.
    """
    row = tl.program_id(0).to(tl.int64)
    frame = row // TOKENS
    columns_a = tl.arange(0, C0)
    columns_b = C0 + tl.arange(0, C1 if C1 > 0 else 16)
    inside_a, inside_b = columns_a < C, columns_b < C
    a = _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, row, frame, columns_a, inside_a, C)
    b = a
    if C1 > 0:
        b = _updated(x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, updated, row, frame, columns_b, inside_b, C)
    if shift is not None:
        total = tl.sum(a, 0)
        if C1 > 0:
            total += tl.sum(b, 0)
        mean = total / C
        # Deviations from the mean rather than a difference of moments: rows with a large common offset keep their digits.
        spread = tl.sum(tl.where(inside_a, (a - mean) * (a - mean), 0.0), 0)
        if C1 > 0:
            spread += tl.sum(tl.where(inside_b, (b - mean) * (b - mean), 0.0), 0)
        inverse = tl.math.rsqrt(spread / C + EPS)
        a = _modulated(a, mean, inverse, shift, shift_row, scale, scale_row, x, frame, columns_a, inside_a)
        if C1 > 0:
            b = _modulated(b, mean, inverse, shift, shift_row, scale, scale_row, x, frame, columns_b, inside_b)
    _finish(a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b, C, C0, C1, QUANT, SWIZZLED, NATIVE)


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
    columns_a = tl.arange(0, C0)
    columns_b = C0 + tl.arange(0, C1 if C1 > 0 else 16)
    inside_a, inside_b = columns_a < C, columns_b < C
    a = _gated(main, main_row, camera, camera_row, gate, gate_row, row, columns_a, inside_a)
    b = a
    if C1 > 0:
        b = _gated(main, main_row, camera, camera_row, gate, gate_row, row, columns_b, inside_b)
    _finish(a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_a, inside_b, C, C0, C1, QUANT, SWIZZLED, NATIVE)


@triton.jit
def norm_rows(x, x_row, weight, out, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr):
    """Grid (rows). Root-mean-square norm with weight."""
    row = tl.program_id(0).to(tl.int64)
    columns_a = tl.arange(0, C0)
    columns_b = C0 + tl.arange(0, C1 if C1 > 0 else 16)
    inside_a, inside_b = columns_a < C, columns_b < C
    a = tl.load(x + row * x_row + columns_a, mask=inside_a, other=0.0).to(tl.float32)
    b = a
    total = tl.sum(a * a, 0)
    if C1 > 0:
        b = tl.load(x + row * x_row + columns_b, mask=inside_b, other=0.0).to(tl.float32)
        total += tl.sum(b * b, 0)
    inverse = tl.math.rsqrt(total / C + EPS)
    a *= inverse * tl.load(weight + columns_a, mask=inside_a, other=0.0).to(tl.float32)
    tl.store(out + row * C + columns_a, a.to(out.dtype.element_ty), mask=inside_a)
    if C1 > 0:
        b *= inverse * tl.load(weight + columns_b, mask=inside_b, other=0.0).to(tl.float32)
        tl.store(out + row * C + columns_b, b.to(out.dtype.element_ty), mask=inside_b)

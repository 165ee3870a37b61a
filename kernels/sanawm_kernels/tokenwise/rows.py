"""Triton kernels over whole rows: residual update, LayerNorm with modulation, output gate, RMS norm, quantization of rows.

A program has a token's C channels in registers, as a tile of C0 channels (the largest power of two within C) and one of C1: 2240 = 2048 + 192, of
which 3 % is masked, where a single tile of 4096 would leave 45 % of its lanes idle. A row's sums take as long as its memory traffic; so a program of
several rows asks for STAGES - 1 of them before it waits for the first: the first rows of all programs are finished while the others arrive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import FP8_ROWS, NO_CODES, rounded, store_row


@triton.jit
def _channels(C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Of both tiles the channels, and which of the second exist."""
    columns_b = C0 + tl.arange(0, C1)
    return tl.arange(0, C0), columns_b, columns_b < C


@triton.jit
def _tile(x, column, inside):
    """A tile of the row at a pointer; `inside` is None where all of it exists."""
    return tl.load(x + column) if inside is None else tl.load(x + column, mask=inside, other=0.0)


@triton.jit
def _load(x, columns_a, columns_b, inside_b):
    """Both tiles of the row at a pointer."""
    return _tile(x, columns_a, None), _tile(x, columns_b, inside_b)


@triton.jit
def _store(out, a, b, columns_a, columns_b, inside_b):
    tl.store(out + columns_a, a.to(out.dtype.element_ty))
    tl.store(out + columns_b, b.to(out.dtype.element_ty), mask=inside_b)


@triton.jit
def _each(x, LANES: tl.constexpr):
    """A tile as what each of the program's threads has of it."""
    return tl.reshape(x, (LANES, x.shape[0] // LANES), can_reorder=True)


@triton.jit
def _total(a, b, LANES: tl.constexpr):
    """Sum of both tiles: one reduction over the program's LANES threads, where each has elements of both."""
    if min(a.shape[0], b.shape[0]) >= LANES:
        return tl.sum(tl.sum(_each(a, LANES), 1) + tl.sum(_each(b, LANES), 1), 0)
    else:
        return tl.sum(a, 0) + tl.sum(b, 0)


@triton.jit
def _largest(a, b, LANES: tl.constexpr):
    """Largest magnitude of both tiles. Over threads magnitudes are compared as integers, for which a warp has an instruction."""
    a, b = tl.abs(a), tl.abs(b)
    if min(a.shape[0], b.shape[0]) >= LANES:
        mine = tl.maximum(tl.max(_each(a, LANES), 1), tl.max(_each(b, LANES), 1))
        return tl.max(mine.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    else:
        return tl.maximum(tl.max(a, 0), tl.max(b, 0))


@triton.jit
def _updated(value, branch, gate, extra, like, column, inside):
    """The residual stream of a tile after the update, rounded as it is stored; operands are a row's pointers, `gate` a tile."""
    total = value.to(tl.float32)
    if branch is not None:
        update = _tile(branch, column, inside).to(tl.float32)
        if gate is not None:
            update *= gate.to(tl.float32)
        total += update
    if extra is not None:
        total += _tile(extra, column, inside).to(tl.float32)
    return total.to(like.dtype.element_ty)


@triton.jit
def _modulated(centred, inverse, shift, scale):
    return centred * inverse * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)


@triton.jit
def _finish(
    a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_b,
    KIND: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store both float32 tiles rounded to KIND (None: they are), quantized after that, or both; what lies outside a row is 0."""
    if out is not None:
        _store(out + row * C, a, b, columns_a, columns_b, inside_b)
    if QUANT != NO_CODES:
        if KIND is not None:
            a, b = rounded(a, KIND), rounded(b, KIND)
        if QUANT == FP8_ROWS:
            amax = _largest(a, b, LANES)
            scale = tl.where(amax > 0.0, tl.maximum(tl.math.div_rn(amax, 448.0), 1.1754943508222875e-38), 1.0)
            tl.store(scales + row, scale)
        else:
            scale = tl.load(quant_scale)
        store_row(a, codes, scales, scale, row, 0, C // 16, None, C0, QUANT, SWIZZLED, NATIVE)
        store_row(b, codes, scales, scale, row, C0, C // 16, inside_b, C1, QUANT, SWIZZLED, NATIVE)


@triton.jit
def update_rows(
    x, x_row, branch, branch_row, gate, gate_row, extra, extra_row, shift, shift_row, scale, scale_row,
    updated, out, codes, scales, quant_scale,
    TOKENS: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    EPS: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows / R). updated = x + gate * branch + extra; then, with `shift`, LayerNorm and modulation; then stores.

    Absent operands and outputs are None. TOKENS rows, a multiple of R, share one row of gate, shift and scale.
    """
    first = tl.program_id(0).to(tl.int64) * R
    frame = first // TOKENS
    columns_a, columns_b, inside_b = _channels(C, C0, C1)
    gate_a, gate_b = None, None
    if gate is not None:
        gate_a, gate_b = _load(gate + frame * gate_row, columns_a, columns_b, inside_b)
    if shift is not None:
        shift_a, shift_b = _load(shift + frame * shift_row, columns_a, columns_b, inside_b)
        scale_a, scale_b = _load(scale + frame * scale_row, columns_a, columns_b, inside_b)
    for i in tl.range(0, R, num_stages=STAGES):
        row = first + i
        a, b = _load(x + row * x_row, columns_a, columns_b, inside_b)
        if updated is not None:
            added = branch + row * branch_row if branch is not None else None
            summand = extra + row * extra_row if extra is not None else None
            a = _updated(a, added, gate_a, summand, updated, columns_a, None)
            b = _updated(b, added, gate_b, summand, updated, columns_b, inside_b)
            _store(updated + row * C, a, b, columns_a, columns_b, inside_b)
        a, b = a.to(tl.float32), b.to(tl.float32)
        if shift is not None:
            mean = _total(a, b, LANES) / C
            # Deviations from the mean rather than a difference of moments: rows with a large common offset keep their digits.
            a, b = a - mean, tl.where(inside_b, b - mean, 0.0)
            inverse = tl.math.rsqrt(_total(a * a, b * b, LANES) / C + EPS)
            a, b = _modulated(a, inverse, shift_a, scale_a), _modulated(b, inverse, shift_b, scale_b)
        _finish(
            a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_b,
            x.dtype.element_ty if shift is not None else None, LANES, C, C0, C1, QUANT, SWIZZLED, NATIVE,
        )  # fmt: skip


@triton.jit
def _gated(main, camera, gate, column, inside):
    """A tile of (main + camera) * SiLU(gate), of a row's pointers."""
    value = _tile(main, column, inside).to(tl.float32)
    if camera is not None:
        value += _tile(camera, column, inside).to(tl.float32)
    g = _tile(gate, column, inside).to(tl.float32)
    return value * g * tl.sigmoid(g)


@triton.jit
def gate_rows(
    main, main_row, camera, camera_row, gate, gate_row, out, codes, scales, quant_scale,
    LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (rows). (main + camera) * SiLU(gate), the product in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns_a, columns_b, inside_b = _channels(C, C0, C1)
    summand = camera + row * camera_row if camera is not None else None
    a = _gated(main + row * main_row, summand, gate + row * gate_row, columns_a, None)
    b = _gated(main + row * main_row, summand, gate + row * gate_row, columns_b, inside_b)
    _finish(
        a, b, row, out, codes, scales, quant_scale, columns_a, columns_b, inside_b,
        main.dtype.element_ty, LANES, C, C0, C1, QUANT, SWIZZLED, NATIVE,
    )  # fmt: skip


@triton.jit
def norm_rows(x, x_row, weight, out, LANES: tl.constexpr, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EPS: tl.constexpr):
    """Grid (rows). Root-mean-square norm with weight."""
    row = tl.program_id(0).to(tl.int64)
    columns_a, columns_b, inside_b = _channels(C, C0, C1)
    a, b = _load(x + row * x_row, columns_a, columns_b, inside_b)
    weight_a, weight_b = _load(weight, columns_a, columns_b, inside_b)
    a, b = a.to(tl.float32), b.to(tl.float32)
    inverse = tl.math.rsqrt(_total(a * a, b * b, LANES) / C + EPS)
    _store(out + row * C, a * inverse * weight_a.to(tl.float32), b * inverse * weight_b.to(tl.float32), columns_a, columns_b, inside_b)

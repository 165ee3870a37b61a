"""Triton kernel of the FFN's depthwise 3x3 convolution with bias and gated linear unit, channels last.

A program walks down BX columns of one frame and one block of channels, value half and gate half together. Columns are tensors of their own, so that
a pixel's neighbours to the left and right are other registers of the same thread: an input row is read once, with a column more on either side,
and added to the three output rows it touches, two of which wait in registers. The next row is on its way meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sanawm_kernels.quant.triton import FP8, NO_CODES, NVFP4, nvfp4_blocks, rounded, saturate_e4m3, scale_offset

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_row(x, half: tl.constexpr, inside, pixel, x_row, x0, channel, present, W: tl.constexpr, BX: tl.constexpr):
    """Columns x0 - 1 to x0 + BX of an image row as two tuples, values and gates `half` apart; zero outside the image.

    pixel: where the row's column x0 is; inside: whether there is such a row.
    """
    at = x + pixel.to(tl.int64) * x_row + channel
    values, gates = (), ()
    for i in tl.static_range(-1, BX + 1):
        mask = present & inside
        if i < 0:
            mask = mask & (x0 > 0)
        elif i == BX or W % BX != 0:
            mask = mask & (x0 + i < W)
        column = at + i * x_row
        values = values + (tl.load(column, mask=mask, other=0),)  # type: ignore[assignment] # noqa: RUF005
        gates = gates + (tl.load(column + half, mask=mask, other=0),)  # type: ignore[assignment] # noqa: RUF005
    return values, gates


@triton.jit
def _numbers(raw, BC: tl.constexpr):
    """float32 of a loaded column, whose bfloat16 elements come two in an integer."""
    if raw.dtype == tl.int32:
        even, odd = (raw << 16).to(tl.float32, bitcast=True), (raw & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (BC,))
    else:
        return raw.to(tl.float32)


@triton.jit
def _all_numbers(raw, BC: tl.constexpr):
    found = ()
    for i in tl.static_range(len(raw)):
        found = found + (_numbers(raw[i], BC),)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def _taps(taps, channel, present, factor: tl.constexpr, G: tl.constexpr):
    """The nine taps times a factor as float32 vectors."""
    found = ()
    for i in tl.static_range(9):
        tap = tl.load(taps + i * 2 * G + channel, mask=present, other=0.0).to(tl.float32) * factor
        found = found + (tap,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def filtered(start, columns, taps, K: tl.constexpr, BX: tl.constexpr):
    """start plus row K of the kernel over an input row, for each of BX columns."""
    found = ()
    for i in tl.static_range(BX):
        y = start[i] + columns[i] * taps[3 * K] + columns[i + 1] * taps[3 * K + 1] + columns[i + 2] * taps[3 * K + 2]
        found = found + (y,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def repeated(x, TIMES: tl.constexpr):
    found = ()
    for _ in tl.static_range(TIMES):
        found = found + (x,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def _store(
    result, out, codes, scales, factor, pixel, i: tl.constexpr, block, shown,
    KIND: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Store BC float32 channels of pixel + i, from `block` on, rounded to KIND, quantized after that, or both.

    shown: whether there is such a pixel; factor: the global scale of NVFP4, the reciprocal of FP8's.
    """
    channel = block + tl.arange(0, BC)
    mask = (channel < G) & shown
    if out is not None:
        tl.store(out + pixel * G + i * G + channel, result.to(out.dtype.element_ty), mask=mask)
    if QUANT != NO_CODES:
        result = rounded(result, KIND)
    if QUANT == NVFP4:
        packed, steps = nvfp4_blocks(tl.reshape(result, (1, BC)), factor, 1, BC // 16, NATIVE)
        byte = block // 2 + tl.arange(0, BC // 2)
        tl.store(codes + pixel * (G // 2) + i * (G // 2) + byte, tl.reshape(packed, (BC // 2,)), mask=(byte < G // 2) & shown)
        sixteen = block // 16 + tl.arange(0, BC // 16)
        at = scales + scale_offset(pixel + i, sixteen, G // 16, SWIZZLED)
        tl.store(at, tl.reshape(steps, (BC // 16,)), mask=(sixteen < G // 16) & shown)
    elif QUANT != NO_CODES:
        tl.store(codes + pixel * G + i * G + channel, saturate_e4m3(result * factor), mask=mask)


@triton.jit
def depthwise_glu(
    x, x_row, taps, bias, out, codes, scales, quant_scale,
    H: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
    QUANT: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(G, BC), cdiv(W, BX) * cdiv(H, STRIP), frames). x (frames * H * W, 2G), taps (9, 2G), bias (2G,); STRIP output rows a program."""
    # Two bfloat16 channels wait in one register, where rows allow it.
    PAIRS: tl.constexpr = x.dtype.element_ty == tl.bfloat16 and G % 16 == 0
    block = tl.program_id(0) * BC
    channel = block + tl.arange(0, BC)
    tiles = (W + BX - 1) // BX
    x0 = tl.program_id(1) % tiles * BX
    y0 = tl.program_id(1) // tiles * STRIP
    # The last frames first: what the product before has written last is still in the second-level cache.
    first_pixel = (tl.num_programs(2) - 1 - tl.program_id(2)) * (H * W)
    present = channel < G
    # With FP8, where arithmetic takes longest, gates are -log2(e) times as large, ready for exp2, and values -log(2) times: their product stays.
    v_factor: tl.constexpr = -LN_2 if QUANT == FP8 else 1.0
    g_factor: tl.constexpr = -LOG2_E if QUANT == FP8 else 1.0
    exponent: tl.constexpr = 1.0 if QUANT == FP8 else -LOG2_E
    v_taps, g_taps = _taps(taps, channel, present, v_factor, G), _taps(taps, channel + G, present, g_factor, G)
    v_bias = tl.load(bias + channel, mask=present, other=0.0).to(tl.float32) * v_factor
    g_bias = tl.load(bias + G + channel, mask=present, other=0.0).to(tl.float32) * g_factor
    half: tl.constexpr = G // 2 if PAIRS else G
    if PAIRS:
        source, unit, step = x.to(tl.pointer_type(tl.int32), bitcast=True), block // 2 + tl.arange(0, BC // 2), x_row.to(tl.int64) // 2
    else:
        source, unit, step = x, channel, x_row.to(tl.int64)
    here = unit < half

    factor = 1.0
    if QUANT == NVFP4:
        factor = tl.load(quant_scale)
    elif QUANT != NO_CODES:
        factor = tl.math.div_rn(1.0, tl.load(quant_scale))

    # `above` waits for output row y - 1, `here` for row y, when input row y arrives.
    zero = tl.zeros((BC,), tl.float32)
    v_above, g_above = repeated(zero, BX), repeated(zero, BX)
    v_here, g_here = repeated(v_bias, BX), repeated(g_bias, BX)
    v_next, g_next = _load_row(source, half, y0 > 0, first_pixel + (y0 - 1) * W + x0, step, x0, unit, here, W, BX)
    for y in range(y0 - 1, y0 + STRIP + 1):
        v_row, g_row = _all_numbers(v_next, BC), _all_numbers(g_next, BC)
        inside = (y + 1 < H) & (y < y0 + STRIP)
        v_next, g_next = _load_row(source, half, inside, first_pixel + (y + 1) * W + x0, step, x0, unit, here, W, BX)
        # In this order fewest sums wait in registers.
        value = filtered(v_above, v_row, v_taps, 2, BX)
        v_above = filtered(v_here, v_row, v_taps, 1, BX)
        v_here = filtered(repeated(v_bias, BX), v_row, v_taps, 0, BX)
        gate = filtered(g_above, g_row, g_taps, 2, BX)
        pixel = (first_pixel + (y - 1) * W + x0).to(tl.int64)
        done = (y > y0) & (y <= H)
        for i in tl.static_range(BX):
            # The square of a reciprocal root costs a third of a division.
            root = tl.math.rsqrt(1.0 + tl.exp2(gate[i] * exponent))
            result = value[i] * gate[i] * (root * root)
            shown = done & (W % BX == 0 or x0 + i < W)
            _store(result, out, codes, scales, factor, pixel, i, block, shown, x.dtype.element_ty, G, BC, QUANT, SWIZZLED, NATIVE)
        g_above = filtered(g_here, g_row, g_taps, 1, BX)
        g_here = filtered(repeated(g_bias, BX), g_row, g_taps, 0, BX)

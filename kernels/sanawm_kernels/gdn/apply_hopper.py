"""Gluon kernel of phase C of the gated delta network on Hopper, in half precision: what `apply.apply` computes.

A program holds one state in shared memory and multiplies tiles of 64 tokens by it, four warps a tile. From the load of the queries to the store of
the outputs a token's channels stay where they are: the four threads that the tensor cores give a row to hold 8 adjacent channels of every 32 each,
so that rotations and ray matrices need no neighbour, and loads and stores are of 16 bytes. For the product the channels count as permuted: keys and
values of the state in shared memory lie in the order in which an instruction's registers take them. Nothing in the loop waits for another warp.

The two halves of a head, of up to 64 channels each and padded to 64, are tiles of their own: in the camera branch matrices multiply the first, angles
rotate the second.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language import PropagateNan

from sanawm_kernels import roles

# Tokens of a tile, which are the rows of one instruction, and channels of a padded half of a head.
ROWS = gl.constexpr(64)
HALF = gl.constexpr(64)
KEEP_NAN = gl.constexpr(PropagateNan.ALL)
_LANES, _WARPS = [[1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
# Of a half of a tile: channels (64, 64), pairs of them (64, 32); and the tokens' ray matrices (64, 16), which all four threads of a row hold.
TILE = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]], [[0, 8], [0, 16], *_LANES], _WARPS, [], [64, 64]))
PAIRS = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 4], [0, 8], *_LANES], _WARPS, [], [64, 32]))
RAYS = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]], [[0, 0], [0, 0], *_LANES], _WARPS, [], [64, 16]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
TOKEN = gl.constexpr(gl.SliceLayout(1, TILE))
CHANNEL = gl.constexpr(gl.SliceLayout(0, TILE))


@gluon.jit
def apply(
    main_q, main_q_norm, main_row, main_batch, cos, sin, main_out, main_out_row, main_out_batch,
    camera_q, camera_q_norm, camera_row, camera_batch, rays, rays_batch, camera_cos, camera_sin,
    camera_out, camera_out_row, camera_out_batch, q_scale, applied, applied_scale, applied_z,
    B: gl.constexpr, H: gl.constexpr, T: gl.constexpr, S: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
    R: gl.constexpr, TILES: gl.constexpr, EPS: gl.constexpr, PRECISION: gl.constexpr,
    MAIN: gl.constexpr, CAMERA: gl.constexpr, CLAMP: gl.constexpr,
):  # fmt: skip
    """Grid (cdiv(S, R*TILES), B*H*T, branches), camera first. Writes the outputs (B, N, C), rows `out_row` apart."""
    gl.static_assert(R == ROWS and D % 16 == 0 and D <= 2 * HALF and PRECISION == "bf16", "other heads and precisions are `apply.apply`'s")
    slot = gl.program_id(1)
    head, frame = slot // T, slot % T
    batch, first = (head // H).to(gl.int64), (head % H) * D
    start = gl.program_id(0) * (R * TILES)
    stop = gl.minimum(start + R * TILES, S)
    tokens = batch * (T * S)
    keep = gl.allocate_shared_memory(gl.float16, [4, HALF, HALF], gl.NVMMASharedLayout(128, 16))
    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if gl.program_id(2) == 0:
            _keep_state(applied, slot, keep, D)
            _camera(
                camera_q + batch * camera_batch + first, q_scale + tokens, camera_q_norm + first, camera_row.to(gl.int64),
                rays + batch * rays_batch, camera_cos, camera_sin, camera_out + batch * camera_out_batch + first, camera_out_row.to(gl.int64),
                keep, applied_scale + slot * D, frame * S, start, stop, D, CLAMP,
            )  # fmt: skip
    if MAIN:  # noqa: SIM102
        if gl.program_id(2) == CAMERA:
            _keep_state(applied, B * H * T + slot, keep, D)
            _main(
                main_q + batch * main_batch + first, q_scale + B * T * S + tokens, main_q_norm + first, main_row.to(gl.int64), cos, sin,
                main_out + batch * main_out_batch + first, main_out_row.to(gl.int64), keep, applied_scale + (B * H * T + slot) * D,
                applied_z + slot * D, frame * S, start, stop, D, EPS,
            )  # fmt: skip


@gluon.jit
def _swapped(x):
    """(rows, 64) with channel 32m + 8i + 2j + e in the place of 32m + 8j + 2i + e: the order of registers that products take."""
    return x.reshape([x.shape[0], 2, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([x.shape[0], 64])


@gluon.jit
def _keep_state(applied, slot, keep, D: gl.constexpr):
    """Copy a state (D, D) value x key to shared memory, by halves of the values and of the keys, in the order in which products take both."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    # As `_swapped` does with the keys.
    value = (place & 33) | (place >> 2 & 6) | ((place & 6) << 2)
    key = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    applied += slot.to(gl.int64) * (D * D)
    parts = ()
    for part in gl.static_range(4):
        corner = applied + part // 2 * (D // 2 * D) + part % 2 * (D // 2)
        inside = (value < D // 2)[:, None] & (key < D // 2)[None, :]
        parts += (gl.load(corner + value[:, None] * D + key[None, :], mask=inside, other=0.0),)  # type: ignore[assignment]
    for part in gl.static_range(4):
        keep.index(part).store(_swapped(parts[part]))
    fence_async_shared()
    roles.barrier()


@gluon.jit
def _raw(q, token, valid, row, half: gl.constexpr, D: gl.constexpr):
    channel = gl.arange(0, HALF, CHANNEL)
    at = q + half * (D // 2) + token[:, None] * row + channel[None, :]
    return gl.load(at, mask=valid[:, None] & (channel < D // 2)[None, :], other=0.0)


@gluon.jit
def _channels(x, half: gl.constexpr, D: gl.constexpr):
    """A half of a head's row (D,), as (1, 64) float32."""
    channel = gl.arange(0, HALF, CHANNEL)
    return gl.load(x + half * (D // 2) + channel, mask=channel < D // 2, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _queries(raw, inverse, q_norm, half: gl.constexpr, D: gl.constexpr):
    query = raw.to(gl.float32) * inverse[:, None] * _channels(q_norm, half, D)
    return gl.maximum(query, 0.0, propagate_nan=KEEP_NAN)


@gluon.jit
def _angles(table, token, valid, COLUMNS: gl.constexpr, FIRST: gl.constexpr, D: gl.constexpr):
    """Of a table (N, COLUMNS) from column FIRST on what the pairs of a half need, (64, 32)."""
    pair = gl.arange(0, HALF // 2, gl.SliceLayout(0, PAIRS))
    return gl.load(table + FIRST + token[:, None] * COLUMNS + pair[None, :], mask=valid[:, None] & (pair < D // 4)[None, :], other=0.0)


@gluon.jit
def _as_pairs(token):
    return gl.convert_layout(token, gl.SliceLayout(1, PAIRS), assert_trivial=True)


@gluon.jit
def _begun(q, q_scale, row, before, s, stop, D: gl.constexpr):
    """Of a tile from position s on: the tokens and which of them exist, both again as pairs need them; halves of the queries, and their scales."""
    position = s + gl.arange(0, ROWS, TOKEN)
    valid = position < stop
    token = before + position
    raw_low, raw_high = _raw(q, token, valid, row, 0, D), _raw(q, token, valid, row, 1, D)
    inverse = gl.load(q_scale + token, mask=valid, other=0.0)
    return token, valid, _as_pairs(token), _as_pairs(valid), raw_low, raw_high, inverse


@gluon.jit
def _rotated(x, cos, sin):
    """Adjacent channel pairs of a half times exp(i * angle); cos, sin (64, 32)."""
    even, odd = x.reshape([ROWS, HALF // 2, 2]).split()
    c = gl.convert_layout(cos, even.type.layout, assert_trivial=True)
    s = gl.convert_layout(sin, even.type.layout, assert_trivial=True)
    turned = gl.join(even * c - odd * s, even * s + odd * c).reshape([ROWS, HALF])
    return gl.convert_layout(turned, TILE, assert_trivial=True)


@gluon.jit
def _four(x):
    """The four tensors along x's last two axes of two."""
    even, odd = x.split()
    a, c = even.split()
    b, d = odd.split()
    return a, b, c, d


@gluon.jit
def _matrix_row(c, columns, ROW: gl.constexpr, TRANSPOSE: gl.constexpr):
    total = None
    for i in gl.static_range(4):
        entry = columns[ROW][i] if TRANSPOSE else columns[i][ROW]
        part = gl.convert_layout(entry, gl.SliceLayout(1, c[0].type.layout), assert_trivial=True)[:, None] * c[i]
        if i == 0:
            total = part
        else:
            total += part
    return total


@gluon.jit
def _multiplied(x, rays, TRANSPOSE: gl.constexpr):
    """Groups of four channels of a half times the tokens' matrices (64, 16), or their transposes."""
    c = _four(x.reshape([ROWS, HALF // 4, 2, 2]))
    by_column = _four(rays.reshape([ROWS, 2, 2, 2, 2]))
    columns = (_four(by_column[0]), _four(by_column[1]), _four(by_column[2]), _four(by_column[3]))
    y = (
        _matrix_row(c, columns, 0, TRANSPOSE), _matrix_row(c, columns, 1, TRANSPOSE), _matrix_row(c, columns, 2, TRANSPOSE),
        _matrix_row(c, columns, 3, TRANSPOSE),
    )  # fmt: skip
    return gl.convert_layout(gl.join(gl.join(y[0], y[2]), gl.join(y[1], y[3])).reshape([ROWS, HALF]), TILE, assert_trivial=True)


@gluon.jit
def _squares(x, y):
    return gl.sum(x * x + y * y, 1)


@gluon.jit
def _largest(x, y):
    return gl.max(gl.maximum(gl.abs(x), gl.abs(y)), 1)


@gluon.jit
def _operand(query, shrink):
    """A half of the queries relative to their row's size, as the left operand of products."""
    return gl.convert_layout(_swapped((query * shrink[:, None]).to(gl.float16)), gl.DotOperandLayout(0, PRODUCT, 2), assert_trivial=True)


@gluon.jit
def _operands(low, high):
    """A tile's queries as left operands, and the size of each row that they are relative to."""
    largest = gl.maximum(_largest(low, high), 1e-30)
    return _operand(low, 1024 / largest), _operand(high, 1024 / largest), largest / 1024


@gluon.jit
def _seen(low, high, keep, half: gl.constexpr):
    """Issue the product of a tile's operands and a half of the state's values."""
    acc = gl.zeros([ROWS, HALF], gl.float32, PRODUCT)
    acc = warpgroup_mma(low, keep.index(2 * half).permute([1, 0]), acc, use_acc=False, is_async=True)
    return warpgroup_mma(high, keep.index(2 * half + 1).permute([1, 0]), acc, is_async=True)


@gluon.jit
def _scaled(acc, size, scale, half: gl.constexpr, D: gl.constexpr):
    """A half of a product, at its true size."""
    return gl.convert_layout(_swapped(acc), TILE, assert_trivial=True) * size[:, None] * _channels(scale, half, D)


@gluon.jit
def _store(x, out, token, valid, row, half: gl.constexpr, D: gl.constexpr):
    channel = gl.arange(0, HALF, CHANNEL)
    at = out + half * (D // 2) + token[:, None] * row + channel[None, :]
    gl.store(at, x.to(out.dtype.element_ty), mask=valid[:, None] & (channel < D // 2)[None, :])


@gluon.jit
def _camera(
    q, q_scale, q_norm, row, rays, cos, sin, out, out_row, keep, scale, before, start, stop, D: gl.constexpr, CLAMP: gl.constexpr
):  # fmt: skip
    """The camera branch's tokens start to stop of the frame that begins at token `before`."""
    for s in range(start, stop, ROWS):
        token, valid, pair_token, pair_valid, raw_low, raw_high, inverse = _begun(q, q_scale, row, before, s, stop, D)
        ray_token = gl.convert_layout(token, gl.SliceLayout(1, RAYS), assert_trivial=True)
        ray_valid = gl.convert_layout(valid, gl.SliceLayout(1, RAYS), assert_trivial=True)
        entry = gl.arange(0, 16, gl.SliceLayout(0, RAYS))
        matrix = gl.load(rays + ray_token[:, None] * 16 + entry[None, :], mask=ray_valid[:, None], other=0.0)
        turn_cos, turn_sin = _angles(cos, pair_token, pair_valid, D // 4, 0, D), _angles(sin, pair_token, pair_valid, D // 4, 0, D)
        plain_high = _queries(raw_high, inverse, q_norm, 1, D)
        high = _rotated(plain_high, turn_cos, turn_sin)
        plain_low = _queries(raw_low, inverse, q_norm, 0, D)
        low = _multiplied(plain_low, matrix, True)
        if CLAMP:
            rms_before = gl.sqrt(_squares(plain_low, plain_high) / D + 1e-6)
            rms_after = gl.maximum(gl.sqrt(_squares(low, high) / D + 1e-6), 1e-6)
            ratio = gl.minimum(rms_before / rms_after, 1.0)[:, None]
            low, high = low * ratio, high * ratio
        low_operand, high_operand, size = _operands(low, high)
        seen_low, seen_high = _seen(low_operand, high_operand, keep, 0), _seen(low_operand, high_operand, keep, 1)
        seen_low = _scaled(warpgroup_mma_wait(1, deps=[seen_low]), size, scale, 0, D)
        _store(_multiplied(seen_low, matrix, False), out, token, valid, out_row, 0, D)
        # Angles are read a second time, from the cache: the store before keeps the compiler from holding them in registers.
        turn_cos, turn_sin = _angles(cos, pair_token, pair_valid, D // 4, 0, D), _angles(sin, pair_token, pair_valid, D // 4, 0, D)
        seen_high = _scaled(warpgroup_mma_wait(0, deps=[seen_high]), size, scale, 1, D)
        _store(_rotated(seen_high, turn_cos, -turn_sin), out, token, valid, out_row, 1, D)


@gluon.jit
def _main(
    q, q_scale, q_norm, row, cos, sin, out, out_row, keep, scale, z, before, start, stop, D: gl.constexpr, EPS: gl.constexpr
):  # fmt: skip
    """The main branch's tokens start to stop of the frame that begins at token `before`."""
    for s in range(start, stop, ROWS):
        token, valid, pair_token, pair_valid, raw_low, raw_high, inverse = _begun(q, q_scale, row, before, s, stop, D)
        turn_cos, turn_sin = _angles(cos, pair_token, pair_valid, D // 2, 0, D), _angles(sin, pair_token, pair_valid, D // 2, 0, D)
        plain = _queries(raw_low, inverse, q_norm, 0, D)
        denominator = gl.sum(plain * _channels(z, 0, D), 1) + EPS
        low = _rotated(plain, turn_cos, turn_sin)
        turn_cos, turn_sin = _angles(cos, pair_token, pair_valid, D // 2, D // 4, D), _angles(sin, pair_token, pair_valid, D // 2, D // 4, D)
        plain = _queries(raw_high, inverse, q_norm, 1, D)
        denominator += gl.sum(plain * _channels(z, 1, D), 1)
        high = _rotated(plain, turn_cos, turn_sin)
        low_operand, high_operand, size = _operands(low, high)
        size /= denominator
        seen_low, seen_high = _seen(low_operand, high_operand, keep, 0), _seen(low_operand, high_operand, keep, 1)
        _store(_scaled(warpgroup_mma_wait(1, deps=[seen_low]), size, scale, 0, D), out, token, valid, out_row, 0, D)
        _store(_scaled(warpgroup_mma_wait(0, deps=[seen_high]), size, scale, 1, D), out, token, valid, out_row, 1, D)

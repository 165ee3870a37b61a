"""Gluon kernel of phase B of the gated delta network on Hopper, with tf32 products: what `combine.combine` computes of one split.

A program scans 64 rows of one state. The frames' matrices A wait in shared memory, all that fit, asked for before the first step; between two steps
the state passes through shared memory as the left operand, for groups of four warps multiply it, each by its share of A's columns. `summarize` has
rounded A to tf32, and A is symmetric: its rows are the columns that the product takes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from sanawm_kernels import roles
from sanawm_kernels.gdn.transforms import decay_factor, round_tf32

# Rows of a program, which are those of one instruction; padded width of a head; matrices in shared memory.
ROWS = gl.constexpr(64)
P = gl.constexpr(128)
HELD = gl.constexpr(3)


@gluon.constexpr_function
def _state_layout(warps):
    """Of a program's rows: every four warps have as many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, 512 // warps, 8])


@gluon.constexpr_function
def _square_layout(warps):
    return gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0])


@gluon.constexpr_function
def _frame(step, T):
    """The frame of a step: backward from the last to the second, then forward from the first."""
    return T - 1 - step if step < T - 1 else step - T + 1


@gluon.constexpr_function
def _kept(step, T, held):
    """Whether a step's matrix has been in its place, number frame % held, since an earlier step."""
    places = [_frame(i, T) for i in range(step) if _frame(i, T) % held == _frame(step, T) % held]
    return bool(places) and places[-1] == _frame(step, T)


@gluon.jit
def combine(
    gram, update, column, inflation, applied, applied_scale, applied_z,
    main_state_in, main_state_out, z_in, z_out, camera_state_in, camera_state_out, decay_sums, A_log, dt_bias,
    B: gl.constexpr, H: gl.constexpr, T: gl.constexpr, S: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
    ROWS: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, PRECISION: gl.constexpr, SCALED: gl.constexpr,
    MAIN: gl.constexpr, CAMERA: gl.constexpr, HAS_STATE: gl.constexpr, COMMIT: gl.constexpr,
):  # fmt: skip
    """Grid (BLOCKS * branches + MAIN, B*H), arguments and results as `combine.combine`."""
    gl.static_assert(ROWS == 64 and P == 128 and SPLITS == 1 and PRECISION == "tf32" and SCALED, "the rest is `combine.combine`'s")
    job, head = gl.program_id(0), gl.program_id(1)
    heads: gl.constexpr = B * H
    frames = head * T
    decay_sums += frames
    A_log += head % H
    dt_bias += head % H
    squares = frames.to(gl.int64) * (D * D)
    carried = head.to(gl.int64) * (D * D)
    if CAMERA:  # noqa: SIM102  (decided when compiling, the next when running)
        if job < BLOCKS:
            _scan_rows(
                gram + squares, update + squares, inflation + frames, camera_state_in, camera_state_out, carried, applied + squares,
                applied_scale + frames * D, decay_sums, A_log, dt_bias, job * ROWS, T, S, D, True, HAS_STATE, COMMIT,
            )  # fmt: skip
    if MAIN:
        branch: gl.constexpr = heads * T * D * D
        if (job >= CAMERA * BLOCKS) & (job < (CAMERA + 1) * BLOCKS):
            _scan_rows(
                gram + branch + squares, update + branch + squares, None, main_state_in, main_state_out, carried, applied + branch + squares,
                applied_scale + (heads * T + frames) * D, decay_sums, A_log, dt_bias, (job - CAMERA * BLOCKS) * ROWS,
                T, S, D, False, HAS_STATE, COMMIT,
            )  # fmt: skip
        if job == (CAMERA + 1) * BLOCKS:
            _scan_normaliser(
                gram + 2 * branch + squares, column + frames * D, z_in, z_out, head * D, applied_z + frames * D, decay_sums, A_log, dt_bias,
                T, S, D, HAS_STATE, COMMIT,
            )  # fmt: skip


@gluon.jit
def _decays(decay_sums, A_log, dt_bias, T: gl.constexpr, S: gl.constexpr):
    """The frames' decay factors, as a tuple."""
    rate, bias = gl.load(A_log).to(gl.float32), gl.load(dt_bias).to(gl.float32)
    found = ()
    for t in gl.static_range(T):
        found += (decay_factor(gl.load(decay_sums + t) / S, rate, bias),)  # type: ignore[assignment]
    return found


@gluon.jit
def _corrections(inflation, T: gl.constexpr, S: gl.constexpr, CAMERA: gl.constexpr):
    """1 / max(1, mean inflation) of each frame in the camera branch, 1 in the main branch, as a tuple."""
    found = ()
    for t in gl.static_range(T):
        found += (1.0 / gl.maximum(gl.load(inflation + t) / S, 1.0) if CAMERA else 1.0,)  # type: ignore[assignment]
    return found


@gluon.jit
def _ask(gram, held, step: gl.constexpr, T: gl.constexpr, D: gl.constexpr):
    """Start the copy of a step's matrix to its place, where it is needed and not there yet; one group of copies in any case."""
    if step < 2 * T - 1:  # noqa: SIM102
        if not _kept(step, T, HELD):
            t: gl.constexpr = _frame(step, T)
            SQUARE: gl.constexpr = _square_layout(gl.num_warps())
            i, j = gl.arange(0, P, gl.SliceLayout(1, SQUARE))[:, None], gl.arange(0, P, gl.SliceLayout(0, SQUARE))[None, :]
            roles.copy(held.index(t % HELD), gram + t * (D * D) + i * D + j, mask=(i < D) & (j < D))
    async_copy.commit_group()


@gluon.jit
def _scan_rows(
    gram, update, inflation, state_in, state_out, carried, applied, applied_scale, decay_sums, A_log, dt_bias, first,
    T: gl.constexpr, S: gl.constexpr, D: gl.constexpr, CAMERA: gl.constexpr, HAS_STATE: gl.constexpr, COMMIT: gl.constexpr,
):  # fmt: skip
    STATE: gl.constexpr = _state_layout(gl.num_warps())
    held = gl.allocate_shared_memory(gl.float32, [HELD, P, P], gl.NVMMASharedLayout(128, 32))
    left = gl.allocate_shared_memory(gl.float32, [ROWS, P], gl.NVMMASharedLayout(128, 32))
    for step in gl.static_range(HELD):
        _ask(gram, held, step, T, D)
    value, key = first + gl.arange(0, ROWS, gl.SliceLayout(1, STATE)), gl.arange(0, P, gl.SliceLayout(0, STATE))
    place = value[:, None] * D + key[None, :]
    inside = (value < D)[:, None] & (key < D)[None, :]
    target = gl.load(update + _frame(0, T) * (D * D) + place, mask=inside, other=0.0)
    state = gl.zeros([ROWS, P], gl.float32, STATE)
    seed = state
    decays = _decays(decay_sums, A_log, dt_bias, T, S)
    corrections = _corrections(inflation, T, S, CAMERA)
    # What later frames leave for a frame's queries, from the last but one to the first.
    later = ()
    for step in gl.static_range(2 * T - 1):
        if HAS_STATE and step == max(T - 2, 0):
            seed = gl.load(state_in + carried + place, mask=inside, other=0.0)
        if step == T - 1:
            state = seed * decays[_frame(step, T)]
        else:
            state = state * decays[_frame(step, T)]
        present = target
        # A frame's update, as the carried state, is asked for a step ahead: nothing in it waits for the scan.
        if step + 1 < 2 * T - 1:
            target = gl.load(update + _frame(step + 1, T) * (D * D) + place, mask=inside, other=0.0)
        # The first step of each direction has no state, but that of the chunk before, to multiply.
        if (step > 0 and step != T - 1) or (step == T - 1 and HAS_STATE):
            # All warps have multiplied the state before.
            roles.barrier()
            left.store(round_tf32(state))
            async_copy.wait_group(HELD - 1)
            fence_async_shared()
            roles.barrier()
            lost = gl.zeros([ROWS, P], gl.float32, STATE)
            lost = warpgroup_mma(left, held.index(_frame(step, T) % HELD).permute([1, 0]), lost, use_acc=False, is_async=True)
            present -= warpgroup_mma_wait(0, deps=[lost])
        if step + HELD < 2 * T - 1 and not _kept(step + HELD, T, HELD):
            # The matrix before has arrived in this place, also where no product waited for it, and all warps have multiplied it.
            async_copy.wait_group(HELD - 1)
            roles.barrier()
        _ask(gram, held, step + HELD, T, D)
        state += corrections[_frame(step, T)] * present
        if step < T - 1:
            later += (state,)  # type: ignore[assignment]
        else:
            seen = state
            if step < 2 * T - 2:
                seen += later[2 * T - 3 - step]
            largest = gl.maximum(gl.max(gl.abs(seen), 1), 1e-30)
            gl.store(applied_scale + _frame(step, T) * D + value, largest / 1024, mask=value < D)
            gl.store(applied + _frame(step, T) * (D * D) + place, (seen * (1024 / largest)[:, None]).to(gl.float16), mask=inside)
    if COMMIT:
        # The state may be updated in place: every row of it has been read above, by all threads after this barrier.
        roles.barrier()
        gl.store(state_out + carried + place, state, mask=inside)


@gluon.jit
def _scan_normaliser(
    gram, column, z_in, z_out, carried, applied, decay_sums, A_log, dt_bias,
    T: gl.constexpr, S: gl.constexpr, D: gl.constexpr, HAS_STATE: gl.constexpr, COMMIT: gl.constexpr,
):  # fmt: skip
    SQUARE: gl.constexpr = _square_layout(gl.num_warps())
    ACROSS: gl.constexpr = gl.SliceLayout(0, SQUARE)
    i, channel = gl.arange(0, P, gl.SliceLayout(1, SQUARE)), gl.arange(0, P, ACROSS)
    inside = channel < D
    square = i[:, None] * D + channel[None, :]
    in_square = (i < D)[:, None] & inside[None, :]
    first: gl.constexpr = _frame(0, T)
    matrix = gl.load(gram + first * (D * D) + square, mask=in_square, other=0.0)
    target = gl.load(column + first * D + channel, mask=inside, other=0.0)
    z = gl.zeros([P], gl.float32, ACROSS)
    seed = z
    if HAS_STATE:
        seed = gl.load(z_in + carried + channel, mask=inside, other=0.0)
    decays = _decays(decay_sums, A_log, dt_bias, T, S)
    later = ()
    for step in gl.static_range(2 * T - 1):
        if step == T - 1:
            z = seed
        z = z * decays[_frame(step, T)]
        present, a = target, matrix
        if step + 1 < 2 * T - 1:
            matrix = gl.load(gram + _frame(step + 1, T) * (D * D) + square, mask=in_square, other=0.0)
            target = gl.load(column + _frame(step + 1, T) * D + channel, mask=inside, other=0.0)
        z += present - gl.convert_layout(gl.sum(a * z[None, :], 1), ACROSS)
        if step < T - 1:
            later += (z,)  # type: ignore[assignment]
        else:
            seen = z
            if step < 2 * T - 2:
                seen += later[2 * T - 3 - step]
            gl.store(applied + _frame(step, T) * D + channel, seen, mask=inside)
    if COMMIT:
        # The state may be updated in place: no thread may still be reading it.
        roles.barrier()
        gl.store(z_out + carried + channel, z, mask=inside)

"""Fused gated delta network against the plain definition in float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sanawm_kernels import ops
from sanawm_kernels.gdn import fused
from sanawm_kernels.gdn.arguments import BlockOutput, GDNState
from sanawm_kernels.gdn.samples import Sample, reference, relative_error, sample
from sanawm_kernels.quant.interpreter import exact, poisoned

FIELDS = ("s", "z", "k_tail", "s_cam", "cam_tail")
# Float32 throughout: sums of some hundred products with random rounding errors, relative L2.
FLOAT32 = 8 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def run(inputs: Sample, state: GDNState | None = None, **options: object) -> BlockOutput:
    return fused.block_gdn(inputs.main, inputs.camera, inputs.gates, state=state, **inputs.options, **options)  # type: ignore[arg-type]


def errors(result: BlockOutput, wanted: tuple[torch.Tensor, torch.Tensor, GDNState]) -> dict[str, float]:
    assert result.main is not None and result.camera is not None and result.state is not None
    found = {"main": relative_error(result.main, wanted[0]), "camera": relative_error(result.camera, wanted[1])}
    return found | {field: relative_error(getattr(result.state, field), getattr(wanted[2], field)) for field in FIELDS}


def check_two_chunks(
    shape: tuple[int, int, int, int, int], bound: float, *, clamp: bool = False, carry: bool = True, precision: str | None = None
) -> None:
    """A first chunk without state, then one that carries on."""
    state, wanted = None, None
    for seed in range(2):
        inputs = sample(*shape, dtype=torch.float32, seed=seed, clamp=clamp)
        inputs = replace(inputs, camera=replace(inputs.camera, carry=carry))
        wanted = reference(inputs, None if wanted is None else wanted[2])
        result = run(inputs, state, precision=precision)
        assert max(errors(result, wanted).values()) < bound, errors(result, wanted)
        state = result.state


# 7 tokens a frame: no tile is full, and the second split of the tokens is empty.
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_frames(frames: int) -> None:
    check_two_chunks((1, 1, 16, frames, 7), FLOAT32)


def test_full_head_width() -> None:
    check_two_chunks((1, 1, 112, 2, 5), FLOAT32)


def test_batch() -> None:
    check_two_chunks((2, 2, 16, 2, 3), FLOAT32)


def test_several_tiles_and_splits() -> None:
    check_two_chunks((1, 1, 16, 1, 37), FLOAT32)


def test_clamp() -> None:
    check_two_chunks((1, 1, 16, 2, 5), FLOAT32, clamp=True)


@pytest.mark.parametrize("frames", [1, 4])
def test_convolution_that_starts_at_zero(frames: int) -> None:
    check_two_chunks((1, 1, 16, frames, 3), FLOAT32, carry=False)


def test_stored_keys() -> None:
    # tf32 keeps 11 bits: each operand is off by 2**-12 at most, four meet in an output, and the division by a sum of few keys adds.
    check_two_chunks((1, 2, 32, 3, 5), 2**-10, precision="tf32")


def test_ray_matrices_shared_by_the_batch() -> None:
    inputs = sample(2, 1, 16, 2, 5, dtype=torch.float32)
    shared = replace(inputs.camera, rays=inputs.camera.rays[:1], rays_inverse=inputs.camera.rays_inverse[:1])
    inputs = replace(inputs, camera=shared)
    assert max(errors(run(inputs), reference(inputs)).values()) < FLOAT32


# Relative L2 errors against float64 of the public Triton kernels in bfloat16, measured on an H200 for one block of 3 frames.
PUBLIC = {"main": 3.8e-3, "s": 3.6e-3, "z": 1.2e-3, "camera": 2.9e-3, "s_cam": 3.0e-3}


def test_bfloat16_is_at_least_as_exact_as_the_public_kernels() -> None:
    inputs = sample(1, 1, 112, 3, 16, dtype=torch.bfloat16)
    with exact():
        found = errors(run(inputs), reference(inputs))
    assert all(found[name] <= bound for name, bound in PUBLIC.items()), found
    assert found["k_tail"] == found["cam_tail"] == 0


def test_error_of_carried_state_does_not_grow() -> None:
    # The state forgets (decay) and is corrected (delta rule), so old errors fade while every chunk adds its own: 40 chunks stay within twice
    # the error of one. Both are averaged over four chunks, because with so few tokens a single chunk's error varies by half.
    found: dict[str, list[float]] = {field: [] for field in ("s", "z", "s_cam")}
    state, wanted = None, None
    with exact():
        for seed in range(40):
            inputs = sample(1, 1, 16, 1, 3, dtype=torch.bfloat16, seed=seed)
            wanted = reference(inputs, None if wanted is None else wanted[2])
            state = run(inputs, state).state
            for field in found:
                found[field].append(relative_error(getattr(state, field), getattr(wanted[2], field)))
    for field, series in found.items():
        assert sum(series[-4:]) <= 2 * sum(series[:4]), (field, series)


def test_read_only_and_in_place() -> None:
    first, second = (sample(1, 2, 16, frames, 5, dtype=torch.float32, seed=frames) for frames in (3, 2))
    state = run(first, precision="tf32").state
    assert state is not None
    before = {field: getattr(state, field).clone() for field in FIELDS}
    committed = run(second, state, precision="tf32")
    read = run(second, state, precision="tf32", commit=False)
    assert read.state is None
    assert all(torch.equal(getattr(state, field), before[field]) for field in FIELDS)
    in_place = run(second, state, precision="tf32", state_out=state)
    assert in_place.state is state
    for other in (read, in_place):
        assert torch.equal(other.main, committed.main) and torch.equal(other.camera, committed.camera)  # type: ignore[arg-type]
    assert all(torch.equal(getattr(state, field), getattr(committed.state, field)) for field in FIELDS)


def test_outputs_go_where_asked() -> None:
    inputs = sample(1, 2, 16, 1, 5, dtype=torch.float32)
    wide = torch.full((1, 5, 80), torch.nan)
    result = run(inputs, main_out=wide[..., 16:48], camera_out=wide[..., 48:])
    plain = run(inputs)
    assert torch.equal(wide[..., 16:48], plain.main) and torch.equal(wide[..., 48:], plain.camera)  # type: ignore[arg-type]
    assert wide[..., :16].isnan().all() and result.main is not None


def test_zero_queries_give_zero() -> None:
    inputs = sample(1, 1, 16, 2, 5, dtype=torch.float32)
    nothing = replace(inputs.main, q=torch.zeros_like(inputs.main.k), k=inputs.main.k.contiguous(), v=inputs.main.v.contiguous())
    result = fused.block_gdn(nothing, None, inputs.gates, **inputs.options)
    assert result.main is not None and not result.main.any()


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_nan_is_not_rectified_away(precision: str) -> None:
    inputs = sample(1, 1, 16, 1, 5, dtype=torch.float32)
    for branch in (inputs.main, inputs.camera):
        branch.q[0, 1, 3] = torch.nan
    result = run(inputs, precision=precision)
    for out in (result.main, result.camera):
        assert out is not None
        # The norm of a query spreads its NaN over the query's channels, and no further.
        assert out[0, 1].isnan().all() and out[0, 0].isfinite().all() and out[0, 2:].isfinite().all()
    inputs.main.k[0, 2, 0] = inputs.camera.k[0, 2, 0] = torch.nan
    state = run(inputs, precision=precision).state
    assert state is not None and all(getattr(state, field).isnan().any() for field in ("s", "z", "s_cam"))


def test_one_branch_at_a_time_through_the_dispatch() -> None:
    x = sample(1, 2, 16, 2, 5, dtype=torch.float32)
    m, c = x.main, x.camera
    main, camera, state = reference(x)
    with ops.implementation(fused.FUSED):
        found_main = ops.main_gdn(m.q, m.k, m.v, x.gates, m.conv, m.q_norm, m.k_norm, m.cos, m.sin, **x.options)
        found_camera = ops.camera_gdn(c.q, c.k, c.v, x.gates, c.conv, c.q_norm, c.k_norm, c.rays, c.rays_inverse, c.cos, c.sin, **x.options)
    wanted = (main, state.s, state.z, state.k_tail, camera, state.s_cam, state.cam_tail)
    for found, exactly in zip(found_main + found_camera, wanted):
        assert exactly is not None and relative_error(found, exactly) < FLOAT32

"""Fused gated delta network on a GPU at the official size, against the plain definition in float64; run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sanawm_kernels.gdn import fused
from sanawm_kernels.gdn.arguments import GDNState
from sanawm_kernels.gdn.samples import Sample, reference, relative_error, sample
from sanawm_kernels.quant.interpreter import poisoned

pytestmark = pytest.mark.gpu
FIELDS = ("s", "z", "k_tail", "s_cam", "cam_tail")
# Relative L2 errors against float64 of the public Triton kernels in bfloat16, measured on an H200 for one block of 3 frames.
PUBLIC = {"main": 3.8e-3, "s": 3.6e-3, "z": 1.2e-3, "camera": 2.9e-3, "s_cam": 3.0e-3, "k_tail": 0.0, "cam_tail": 0.0}
# Rounding of the output to bfloat16 alone is 1.7e-3; what is not rounded so shows the products' own precision.
EXACT = {"main": 2e-3, "s": 2e-6, "z": 2e-6, "camera": 2e-3, "s_cam": 2e-6, "k_tail": 0.0, "cam_tail": 0.0}
TF32 = EXACT | {"s": 5e-4, "z": 5e-4, "s_cam": 5e-4}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def official(frames: int, seed: int, heads: int = 20, tokens: int = 880, batch: int = 1) -> Sample:
    return sample(batch, heads, 112, frames, tokens, dtype=torch.bfloat16, device="cuda", seed=seed)


def errors(inputs: Sample, state: GDNState | None, old: GDNState | None, precision: str) -> tuple[dict[str, float], GDNState, GDNState]:
    result = fused.block_gdn(inputs.main, inputs.camera, inputs.gates, state=state, precision=precision, **inputs.options)
    main, camera, new = reference(inputs, old)
    assert result.main is not None and result.camera is not None and result.state is not None
    found = {"main": relative_error(result.main, main), "camera": relative_error(result.camera, camera)}
    return found | {f: relative_error(getattr(result.state, f), getattr(new, f)) for f in FIELDS}, result.state, new


@pytest.mark.parametrize(("precision", "bounds"), [("bf16", PUBLIC), ("tf32", TF32), ("ieee", EXACT)])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_two_chunks(frames: int, precision: str, bounds: dict[str, float]) -> None:
    state = old = None
    for seed in range(2):
        found, state, old = errors(official(frames, seed), state, old, precision)
        assert all(found[name] <= bound for name, bound in bounds.items()), found


@pytest.mark.parametrize(("heads", "tokens", "batch"), [(3, 61, 2), (2, 879, 1), (1, 17, 1)])
def test_odd_sizes(heads: int, tokens: int, batch: int) -> None:
    found, _, _ = errors(official(3, 0, heads, tokens, batch), None, None, "bf16")
    # With few tokens the errors of single elements average less: half as much again.
    assert all(found[name] <= 1.5 * bound for name, bound in PUBLIC.items()), found


def test_error_of_carried_state_does_not_grow() -> None:
    series: dict[str, list[float]] = {field: [] for field in ("s", "z", "s_cam")}
    state = old = None
    for seed in range(40):
        found, state, old = errors(official(3, seed), state, old, "bf16")
        for field in series:
            series[field].append(found[field])
    # Old errors fade with the state they are in, every chunk adds its own: the last stay within twice the first.
    for field, values in series.items():
        assert sum(values[-4:]) <= 2 * sum(values[:4]), (field, values)


def test_clamp_and_convolution_from_zero() -> None:
    inputs = official(3, 0)
    inputs = replace(inputs, camera=replace(inputs.camera, clamp=True, carry=False))
    _, state, old = errors(official(3, 1), None, None, "bf16")
    found, _, _ = errors(inputs, state, old, "bf16")
    assert all(found[name] <= bound for name, bound in PUBLIC.items()), found


def test_read_only_and_in_place_are_bit_identical() -> None:
    first, second = official(3, 0), official(3, 1)
    state = fused.block_gdn(first.main, first.camera, first.gates, **first.options).state
    assert state is not None
    before = {field: getattr(state, field).clone() for field in FIELDS}
    call = (second.main, second.camera, second.gates)
    committed = fused.block_gdn(*call, **second.options, state=state)
    read = fused.block_gdn(*call, **second.options, state=state, commit=False)
    assert all(torch.equal(getattr(state, field), before[field]) for field in FIELDS)
    in_place = fused.block_gdn(*call, **second.options, state=state, state_out=state)
    for other in (read, in_place):
        assert torch.equal(other.main, committed.main) and torch.equal(other.camera, committed.camera)  # type: ignore[arg-type]
    assert all(torch.equal(getattr(state, field), getattr(committed.state, field)) for field in FIELDS)

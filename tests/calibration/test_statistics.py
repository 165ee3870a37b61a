"""Activation statistics: exact moments, percentiles, merging, sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm_calibration.metrics import cosine, decibel, slope, sqnr
from sanawm_calibration.statistics import Moments, SourceStatistics, merge, restore


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-10, 10), st.floats(0.01, 100))
def test_moments_are_those_of_the_values(seed: int, offset: float, spread: float) -> None:
    x = (torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) + offset) * spread
    moments = Moments.empty()
    for part in x.split(7):
        moments.add(part, part.abs().amax())
    exact = x.double().flatten()
    centred = exact - exact.mean()
    assert moments.count == exact.numel() and moments.amax == float(x.abs().max())
    assert moments.rms == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-6)
    # Powers are summed in float64 from float32 products; the fourth moment is what is left of them, here as little as one part in 10^4.
    assert moments.kurtosis == pytest.approx(float((centred**4).mean() / centred.square().mean() ** 2), rel=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 0.9, 0.999, 0.9999]))
def test_percentile_is_within_a_sixteenth_of_an_octave(seed: int, share: float) -> None:
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(seed)) ** 3
    moments = Moments.empty()
    moments.add(x, x.abs().amax())
    exact = float(x.abs().flatten().sort().values[math.ceil(share * x.numel()) - 1])
    # A bin is as wide as 1/16 of its lower edge.
    assert exact <= moments.percentile(share) * (1 + 1e-6)
    assert moments.percentile(share) <= exact * (1 + 1 / 16) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 7), (33, 64), (20, 150)])
def test_the_histogram_counts_every_magnitude(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) ** 5).to(dtype)
    x[:, 2] = 0
    x[4, 1], x[5, 1], x[6, 1] = 3e38, -1e-38, 1e-41
    moments = Moments.empty()
    for part in x.split(9):
        moments.add(part, part.abs().amax())
    # The definition: a magnitude's bin is its float32 exponent and four bits of its mantissa.
    assert torch.equal(moments.histogram, torch.bincount(x.float().abs().flatten().view(torch.int32) >> 19, minlength=4096))


def test_adding_never_waits_for_the_device() -> None:
    # A tensor without data refuses whatever would wait on a GPU: reading a value, a size that depends on values, a copy to the CPU.
    x = torch.empty(30, 48, dtype=torch.bfloat16, device="meta")
    statistics = SourceStatistics(48, 8, 0, x.device)
    for label in ("1000", "1000", "clean"):
        assert statistics.add(x, label).shape == ()
    assert statistics.rows.shape == (8, 48) and statistics.rows.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        statistics.tensors()


@pytest.mark.gpu
def test_a_gpu_counts_what_the_cpu_counts() -> None:
    x = torch.randn(500, 2240, generator=torch.Generator().manual_seed(4)).mul_(3).bfloat16()
    both = [SourceStatistics(2240, 16, 0, device) for device in ("cpu", "cuda")]
    for part in x.split(170):
        for statistics in both:
            statistics.add(part.to(statistics.rows.device), "1000")
    mine, theirs = (statistics.tensors() for statistics in both)
    sums = {"channel_sum", "1000/powers"}
    assert all(torch.equal(mine[name], theirs[name]) for name in set(mine) - sums)
    # Float64 sums in another order.
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-10, atol=1e-6) for name in sums)


def test_merging_equals_one_pass() -> None:
    x = torch.randn(60, 48, generator=torch.Generator().manual_seed(1))
    whole, parts = SourceStatistics(48, 20, 0), [SourceStatistics(48, 10, seed) for seed in (1, 2)]
    whole.add(x[:30], "1000")
    whole.add(x[30:], "clean")
    parts[0].add(x[:30], "1000")
    parts[1].add(x[30:], "clean")
    total = merge(parts)
    assert torch.equal(total.channel_amax, whole.channel_amax)
    assert torch.allclose(total.channel_mean, whole.channel_mean)
    assert {k: m.summary() for k, m in total.labels.items()} == {k: m.summary() for k, m in whole.labels.items()}
    assert total.rows.shape == (20, 48)
    again = restore(total.tensors())
    assert {k: m.summary() for k, m in again.labels.items()} == {k: m.summary() for k, m in total.labels.items()}
    # The parts are left as they were.
    assert parts[0].labels["1000"].count == 30 * 48


def test_the_sample_is_uniform_over_all_calls() -> None:
    # Rows carry their number; over many seeds every tenth of the stream must contribute equally.
    x = torch.arange(200.0)[:, None].repeat(1, 2)
    found = torch.zeros(10)
    for seed in range(200):
        statistics = SourceStatistics(2, 10, seed)
        for part in x.split(23):
            statistics.add(part, "1000")
        assert len(statistics.rows) == 10 and len(statistics.rows.unique(dim=0)) == 10
        found += torch.bincount((statistics.rows[:, 0].float() / 20).long().clamp_max(9), minlength=10)
    # 2,000 draws, 200 expected in each tenth with a standard deviation of 13; rounding to bfloat16 moves a number by under 1.
    assert bool(((found - 200).abs() < 60).all())


def test_outlier_channels_are_found() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    x[:, 5] *= 30
    x[:, 40] *= 12
    statistics = SourceStatistics(64, 0, 0)
    statistics.add(x, "1000")
    assert [channel for channel, _ in statistics.outliers()] == [5, 40]
    assert len(statistics.rows) == 0


def test_metrics() -> None:
    a = torch.tensor([3.0, 4.0])
    assert sqnr(a, a) == math.inf and sqnr(torch.zeros(2), a) == -math.inf
    assert sqnr(a, torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert decibel(100, 1) == pytest.approx(20)
    assert cosine(a, -2 * a) == pytest.approx(-1)
    assert slope([5.0, 4.0, 3.0]) == pytest.approx(-1) and slope([1.0]) == 0 and math.isnan(slope([1.0, math.inf]))

"""How many input sets a short call is timed with."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from kernel_timing import LEAST_SETS, MOST_SETS, repeats

CACHE = 50 << 20


def test_sets_exceed_the_cache_twice() -> None:
    for nbytes in (3 << 20, 7_000_001, 23_700_000):
        assert repeats(nbytes, 8.0, CACHE) * nbytes >= 2 * CACHE


def test_sets_spread_the_launch_and_stay_few() -> None:
    assert repeats(1 << 30, 90.0, CACHE) == LEAST_SETS
    assert repeats(0, 0.0, CACHE) == MOST_SETS
    assert repeats(1 << 30, 100.0, CACHE) == 1

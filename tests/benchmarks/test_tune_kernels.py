"""The tuner's launches and references, at a small size in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tune_inputs
import tune_kernels as tuner

from sanawm_kernels.gdn import plans as gdn
from sanawm_kernels.quant.interpreter import exact


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"T": 2, "GRID": (2, 4), "H": 3, "D": 16, "G": 32, "TEXT": 20, "S": 8, "C": 48, "N": 16, "DEVICE": "cpu"}
    for name, value in sizes.items():
        monkeypatch.setattr(tune_inputs, name, value)
        if hasattr(tuner, name):
            monkeypatch.setattr(tuner, name, value)
    monkeypatch.setattr(tuner, "BLOCK", gdn.Problem(1, 3, 16, 2, 8, (16 * 8) ** -0.5, commit=False))


@pytest.mark.parametrize("phase", tuner.CHOICES)
def test_first_candidate_is_right(phase: str) -> None:
    candidate = next(tuner.candidates([phase]))
    with exact():
        launch = tuner.Inputs(0).launch(candidate, 0)
        launch.run()
        # With so few tokens errors average less than at the official size.
        assert launch.error() < 2 * tuner.BOUNDS.get(phase, 3e-3)


def test_candidates_are_few_enough_to_compile() -> None:
    found = [str(c) for c in tuner.candidates(list(tuner.CHOICES))]
    assert len(found) == len(set(found)) <= 200

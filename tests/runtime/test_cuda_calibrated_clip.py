"""benchmarks/engine_calibrated.py: a calibrated engine's final latents beside the prediction, and what counts as beyond it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from engine_calibrated import FACTOR, Predicted, beyond, compare

from sanawm.schedule import chunk_grid


def test_a_calibrated_engine_is_as_far_off_as_its_prediction() -> None:
    """Two chunks, launch by launch by Triton's interpreter, from a checkpoint and its own calibration."""
    script = Path(__file__).with_name("cuda_calibrated_interpreted.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["programs"]) >= {"prompt_kv", "camera_first", "denoise_second", "commit_second"} and "decode" not in found["programs"]
    rows = {row["case"]: row for row in found["rows"]}
    for chunk in range(2):
        row, half = rows[f"engine.numerics.chunk{chunk}.fp8-calibrated"], rows[f"peer.torch.numerics.chunk{chunk}.bf16"]
        assert row["peer_value"] > 2 * half["value"], "the recipe's own error is what is compared"
        # Hundreds of latents instead of hundreds of thousands: their error's norm is less steady than at full size.
        assert row["peer_value"] / 1.5 < row["value"] < row["peer_value"] * 1.5
        report = rows[f"{row['case']}.report"]
        assert report["unit"] == "dB" and abs(report["value"] - report["peer_value"]) < 20 * math.log10(1.5)


def latents(error: float, seed: int) -> list[np.ndarray]:
    """Ones with a relative error, of the two chunks of seven latent frames."""
    random = np.random.default_rng(seed)
    return [1 + error * random.standard_normal((1, 8, chunk.frames, 4, 4)).astype(np.float32) for chunk in chunk_grid(7, 3)]


def test_what_is_further_off_than_the_prediction_is_named() -> None:
    chunks = chunk_grid(7, 3)
    predicted = Predicted(latents(0, 0), latents(0.01, 1), latents(0.1, 2))
    within, off = (compare("fp8-calibrated", chunks, latents(error, 3), predicted) for error in (0.1, 0.1 * FACTOR**2))
    assert [row["case"] for row in within if row["peer"]] == beyond(off) and beyond(within) == []
    assert within[0]["value"] == pytest.approx(0.1, rel=0.05) and within[2]["value"] == pytest.approx(20, abs=0.5)
    assert [(row["case"], row["peer_value"]) for row in within[4:]] == [(f"peer.torch.numerics.chunk{i}.bf16", None) for i in range(2)]


def test_numbers_that_are_none_are_beyond_every_prediction() -> None:
    predicted = Predicted(latents(0, 0), latents(0.01, 1), latents(0.1, 2))
    rows = compare("fp8-calibrated", chunk_grid(7, 3), [x * math.nan for x in latents(0, 0)], predicted)
    assert len(beyond(rows)) == 4

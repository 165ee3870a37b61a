"""Printed plans, projections, and the timing of a bundle on a driver that only checks calls."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import cuda_worlds

from sanawm.config import tiny_config
from sanawm.errors import UserError
from sanawm.programs import Geometry
from sanawm_export.cuda import cost
from sanawm_export.cuda.bench import Bench, rows
from sanawm_export.cuda.cli import plan
from sanawm_export.cuda.formats import formats_for
from sanawm_export.cuda.lower import dit_weights, lower_part_dit
from sanawm_runtime.engines.cuda import CudaEngine


def test_the_printed_plan_adds_up() -> None:
    result = CliRunner().invoke(plan, ["--config", "tiny", "--target", "h200", "--json"], catch_exceptions=False)
    document = json.loads(result.output)
    operations = document["operations"]
    assert sum(row["count"] for row in operations) == document["cost"]["steps"] > 50
    assert sum(row["flops"] for row in operations) == document["cost"]["flops"]
    assert sum(row["floor_us"] for row in operations) == pytest.approx(document["cost"]["floor_us"])
    assert document["peak"] <= document["arena"]
    assert document["cost"]["floor_us"] < document["cost"]["projected_us"]


def test_the_table_says_that_projections_are_not_measurements() -> None:
    result = CliRunner().invoke(plan, ["--config", "tiny", "--each"], catch_exceptions=False)
    assert "never measurements" in " ".join(result.output.split())
    assert "blocks.3.camera.attend" in result.output


def test_unknown_programs_and_targets_are_refused() -> None:
    for options, message in ((["--program", "nothing"], "no program 'nothing'"), (["--target", "cpu"], "does not serve cpu")):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(plan, ["--config", "tiny", *options], catch_exceptions=False)


def test_costs_follow_the_slower_of_arithmetic_and_traffic() -> None:
    geometry = Geometry(tiny_config(), 64, 4, "bfloat16")
    steps = lower_part_dit(geometry, dit_weights(geometry), 90)["denoise_steady"].plan.steps
    gpu = cost.GPUS["h200"]
    heavy = replace(next(s for s in steps if s.label.endswith("merged")), flops=989_000_000)
    assert cost.floor_us(heavy, gpu) == pytest.approx(1.0)
    light = replace(heavy, flops=1)
    assert cost.floor_us(light, gpu) == pytest.approx((light.read_bytes + light.write_bytes) / 4.8e6)
    given = cost.Assumptions(0.5, 0.5, 2.0)
    assert cost.step_us(heavy, gpu, given) == pytest.approx(2.0 * 1.0 + 2.0)


def test_a_gpu_without_the_units_is_refused() -> None:
    world = tiny_config()
    geometry = Geometry(world, 64, 4, "bfloat16")
    lowered = lower_part_dit(geometry, dit_weights(geometry, formats_for(world.dit, "nvfp4")), 120)["denoise_steady"]
    assert cost.cost(lowered.plan, cost.GPUS["rtx5090"]).floor_us > 0
    with pytest.raises(UserError, match="no nvfp4 units"):
        cost.cost(lowered.plan, cost.GPUS["h200"])


def test_bench_runs_every_chunk(tmp_path: Path) -> None:
    """The calls of a whole clip are checked by the driver; the times of a driver that does nothing mean nothing."""
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    driver = built.driver()
    engine = CudaEngine(built.bundle, built.device(driver))
    timed = Bench(built.bundle, 65, engine)  # 9 latent frames: 3 + 3 chunks of 2
    times = timed.run()
    assert [len(times.camera), len(times.denoise)] == [4, 4]
    # One graph for each kind of chunk and set of state: first, second, and steady chunks that alternate.
    steps = 4 * len(built.lowered["denoise_first"].plan.kernels())
    assert len(driver.launches) > 4 * steps
    found = {row["case"]: row for row in rows(timed, cost.GPUS["h200"])}
    assert found["engine.chunk.fp32"]["n"] == 2
    assert found["engine.chunk.fp32"]["floor"] > 0
    assert found["engine.denoise.65f.fp32"]["value"] >= found["engine.chunk.fp32"]["value"]
    engine.close()


def test_bench_refuses_a_clip_that_starts_otherwise(tmp_path: Path) -> None:
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    engine = CudaEngine(built.bundle, built.device(built.driver()))
    with pytest.raises(UserError, match="starts with 3 latent frames"):
        Bench(built.bundle, 57, engine)
    engine.close()

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
from sanawm_export import peers
from sanawm_export.cuda import cost
from sanawm_export.cuda.bench import Bench
from sanawm_export.cuda.bench_operations import operations, step_times
from sanawm_export.cuda.bench_rows import row, rows
from sanawm_export.cuda.cli import bench, plan
from sanawm_export.cuda.formats import formats_for
from sanawm_export.cuda.lower import dit_weights, lower_part_dit
from sanawm_runtime.engines._cuda_plan import Launch
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
    # One launch for both branches of a softmax block on Hopper.
    assert "blocks.3.attend" in result.output and "blocks.3.camera.attend" not in result.output


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
    given = cost.Assumptions({"gemm.bf16": 0.5}, 0.25, 0.8, 2.0)
    assert cost.operation_class(heavy) == "gemm.bf16"
    assert cost.step_us(heavy, gpu, given) == pytest.approx(1.0 / 0.5 + 2.0)
    assert cost.step_us(light, gpu, given) == pytest.approx(cost.floor_us(light, gpu) / 0.8 / 0.5 + 2.0)
    other = next(s for s in steps if cost.operation_class(s) == "tokenwise" and not s.flops)
    assert cost.step_us(other, gpu, given) == pytest.approx(cost.floor_us(other, gpu, 0.8) / 0.25 + 2.0)


def test_shares_and_gaps_are_taken_from_rows() -> None:
    def operation(case: str, kind: str, value: float, floor: float, launches: int) -> dict[str, object]:
        return {"case": f"engine.{case}.bf16", "class": kind, "value": value, "floor": floor, "launches": launches}

    rows = [
        operation("denoise_steady.a", "gdn", 40.0, 10.0, 2), operation("commit_steady.a", "gdn", 60.0, 10.0, 2),
        operation("denoise_steady.b", "copy", 20.0, 10.0, 1), {"case": "engine.chunk.bf16", "value": 330e-6},
    ]  # fmt: skip
    assert cost.achieved(rows) == {"copy": 0.5, "gdn": 0.2}
    # Four steps of 60 us and a clean pass of 60 us, 14 launches.
    assert cost.gap_us(rows, "bf16", 4) == pytest.approx(30 / 14)
    assert cost.gap_us(rows, "fp8", 4) is None


def test_the_assumed_shares_are_those_of_the_measured_rows() -> None:
    result = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-engine.json"
    for name, share in cost.achieved(json.loads(result.read_text())["rows"]).items():
        assert cost.ACHIEVED[name] == pytest.approx(share, abs=0.01), name


def test_a_gpu_without_the_units_is_refused() -> None:
    world = tiny_config()
    geometry = Geometry(world, 64, 4, "bfloat16")
    lowered = lower_part_dit(geometry, dit_weights(geometry, formats_for(world.dit, "nvfp4")), 120)["denoise_steady"]
    assert cost.cost(lowered.plan, cost.GPUS["rtx5090"]).floor_us > 0
    with pytest.raises(UserError, match="no nvfp4 units"):
        cost.cost(lowered.plan, cost.GPUS["h200"])


def test_bench_runs_every_chunk(tmp_path: Path) -> None:
    """The calls of a whole clip are checked by the driver, on which a millisecond passes from one timestamp to the next."""
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    driver = built.driver()
    engine = CudaEngine(built.bundle, built.device(driver))
    timed = Bench(built.bundle, 81, engine, clips=2)  # 11 latent frames: 3 + 4 chunks of 2
    timed.run()
    times = timed.times
    assert [len(clips) for clips in (times.camera, times.chunk, times.period, times.denoise)] == [2] * 4
    assert [len(clips[1]) for clips in (times.camera, times.chunk, times.period)] == [5, 5, 4]
    assert times.chunk[1] == pytest.approx([1e-3] * 5) and times.period[1] == pytest.approx([3e-3] * 4)
    found = {row["case"]: row for row in rows(timed, cost.GPUS["h200"])}
    assert found["engine.chunk.fp32"]["floor"] > 0 and found["engine.period.fp32"]["n"] == found["engine.chunk.fp32"]["n"] == 2 * 3
    # Every chunk takes as long as any other on this driver.
    assert found["engine.steadiness.fp32"]["value"] == found["engine.steadiness.single.fp32"]["value"] == pytest.approx(0.0)
    assert 0 < found["engine.denoise.81f.fp32"]["floor"] < found["engine.denoise.81f.fp32"]["value"]
    assert found["engine.memory.fp32"]["value"] > 0
    assert "engine.stream.81f.fp32" not in found
    engine.close()


def test_every_launch_is_timed_in_place(tmp_path: Path) -> None:
    """A launch takes no time on this driver, whose timestamps are a millisecond apart: that is what is taken off again."""
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    driver = built.driver()
    engine = CudaEngine(built.bundle, built.device(driver))
    timed = Bench(built.bundle, 65, engine, clips=1)
    timed.run()
    launched = len(driver.launches)
    plan = built.lowered["denoise_second"].plan
    times = step_times(engine, "denoise_second", timed.clip.bound(timed.chunks[1]), 3)
    assert len(times) == len(plan.steps) and {len(values) for values in times} == {3}
    assert len(driver.launches) - launched == 4 * sum(isinstance(step, Launch) for step in plan.steps)
    assert max(map(max, times)) == pytest.approx(0.0)
    found = operations(plan, [[2.0, 3.0, 4.0]] * len(plan.steps), cost.GPUS["h200"], frozenset({1}))
    assert sum(operation.count for operation in found) == len(plan.steps)
    assert sum(operation.us for operation in found) == 3.0 * len(plan.steps)
    assert {operation.name.partition(".")[0] for operation in found} >= {"gdn", "softmax"}
    # A case is a row, also where one block's kernel is another one.
    steps = [replace(s, kernel="gemm.other") if s.label == "blocks.0.proj" else replace(s, label="blocks.0.proj") if s.label == "blocks.1.proj" else s
             for s in plan.steps]  # fmt: skip
    found = operations(replace(plan, steps=steps), [[2.0]] * len(steps), cost.GPUS["h200"], frozenset())
    assert len({operation.name for operation in found}) == len(found)
    assert [(operation.count, operation.us) for operation in found if operation.kernel.startswith("gemm.other and gemm.")] == [(2, 4.0)]
    del timed
    engine.close()


def test_bench_sets_a_peer_beside_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    monkeypatch.setattr("sanawm_runtime.engines.cuda.CudaEngine", lambda bundle: CudaEngine(bundle, built.device(built.driver())))
    monkeypatch.setattr("sanawm_export.cuda.bench_operations.copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(peers, "folder", lambda name: tmp_path)

    def run(name: str, frames: int) -> dict[str, object]:
        assert json.loads(out.read_text())["rows"], "what was measured is there before a peer begins"
        found = row(f"peer.{name}.denoise.{frames}f.fp32", "device", [2.0], None, "a stand-in")
        return {"versions": {name: "1"}, "rows": [{**found, "peer_of": f"engine.denoise.{frames}f.fp32"}]}

    monkeypatch.setattr(peers, "run", run)
    out = tmp_path / "bench.json"
    options = ["--frames", "81", "--clips", "1", "--operations", "0", "--peer", "sglang", "-o", str(out)]
    result = CliRunner().invoke(bench, [str(built.bundle.root), *options], catch_exceptions=False)
    assert result.exit_code == 0 and "sglang: 2" in result.output
    document = json.loads(out.read_text())
    found = {entry["case"]: entry for entry in document["rows"]}
    assert (found["engine.denoise.81f.fp32"]["peer"], found["engine.denoise.81f.fp32"]["peer_value"]) == ("sglang", 2.0)
    assert found["peer.sglang.denoise.81f.fp32"]["value"] == 2.0 and document["versions"]["sglang"] == "1"


def test_bench_refuses_a_clip_that_starts_otherwise(tmp_path: Path) -> None:
    built = cuda_worlds.Built(tmp_path / "bundle", cuda_worlds.small_world())
    engine = CudaEngine(built.bundle, built.device(built.driver()))
    with pytest.raises(UserError, match="starts with 3 latent frames"):
        Bench(built.bundle, 57, engine, clips=1)
    engine.close()

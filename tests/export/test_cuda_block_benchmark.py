"""The benchmark of whole blocks: what it cuts out of the plan, and its calls on a driver that only checks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import cuda_fake
import cuda_worlds
import kernels_block
from kernel_timing import Case, Work

from sanawm.config import tiny_config
from sanawm_export.cuda import arena, cost, reference
from sanawm_export.cuda.tape import Lowered
from sanawm_runtime.bundle.strict_json import decode
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_kernels import Kernel
from sanawm_runtime.engines._cuda_plan import WEIGHT_PREFIX, Launch, Plan
from sanawm_runtime.engines._cuda_program import Loaded

SMALL = cuda_worlds.small_world()


def tensor(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).view(getattr(torch, dtype))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["gdn", "softmax"])
def test_a_block_runs_by_itself(kind: str, precision: str) -> None:
    """With the benchmark's random inputs and weights the definitions give finite numbers, and nothing is read that is not there."""
    world = tiny_config()
    lowered, tensors = kernels_block.forward(world, precision, 90)
    plan = kernels_block.block_of(lowered.plan, kernels_block.kinds(world)[kind])
    arena.check(plan)
    given = {b.name for b in plan.buffers.values() if b.role == "input"} - {b.name for b in lowered.plan.buffers.values() if b.role == "input"}
    assert given == {"modulation", "embed" if kind == "gdn" else "blocks.2.temporal"}
    random = torch.Generator().manual_seed(4)
    inputs, weights = {}, {}
    for b in plan.buffers.values():
        if b.role == "input":
            inputs[b.name] = tensor(kernels_block.input_values(b, random), b.dtype)
        elif b.role == "weight":
            name = b.name.removeprefix(WEIGHT_PREFIX)
            weights[name] = tensor(kernels_block.weight_values(name, tensors, random), b.dtype)
    (out,) = reference.run(Lowered(plan, lowered.variants), inputs, weights).values()
    # Neither vanishing nor exploding: a residual stream of unit inputs.
    assert 0.5 < float(out.float().std()) < 20


class Driven:
    """The small world's forward on a driver that checks calls."""

    def __init__(self) -> None:
        self.lowered, self.tensors = kernels_block.forward(SMALL, "bf16", 0, "float32")
        entries = {name: cuda_fake.index_entry(variant, "sm_90") for name, variant in self.lowered.variants.items()}
        writes = {s.kernel: s.writes for s in self.lowered.plan.steps if isinstance(s, Launch)}
        self.driver = cuda_fake.FakeDriver({name.encode(): entry for name, entry in entries.items()}, writes)
        self.device = Gpu(driver=self.driver)
        self.kernels = {name: self._loaded(name, entry) for name, entry in entries.items()}

    def _loaded(self, name: str, entry: dict[str, Any]) -> Loaded:
        kernel = decode(Kernel, {n: v for n, v in entry.items() if n in kernels_block.FIELDS}, name)
        return Loaded(kernel, self.device.function(name.encode(), kernel.entry, kernel.shared_bytes))

    def run(self, plan: Plan, aliases: Any = str) -> list[Any]:
        """What is launched when a stage is enqueued once."""
        stream = self.device.new_stream()
        stage = kernels_block.Stage(plan, self.tensors, self.kernels.__getitem__, self.device, aliases)
        del self.driver.launches[:]
        stage.enqueue(stream)
        assert stage.result().dtype == np.float32
        stage.close()
        return list(self.driver.launches)


def test_the_executor_launches_a_block_and_a_forward() -> None:
    driven = Driven()
    plan = driven.lowered.plan
    for part in (kernels_block.block_of(plan, 0), kernels_block.block_of(plan, 1), plan):
        launched = driven.run(part)
        assert [launch.kernel for launch in launched] == [step.kernel for step in part.steps if isinstance(step, Launch)]
        assert len(launched) <= 25 * SMALL.dit.depth
    driven.device.close()


def test_blocks_of_a_kind_share_their_memory() -> None:
    owner = kernels_block.shared_blocks(tiny_config())
    assert owner(f"{WEIGHT_PREFIX}blocks.2.merged.weight") == f"{WEIGHT_PREFIX}blocks.0.merged.weight"
    assert (owner("past.1.s"), owner("sink.3.k"), owner("keys.2")) == ("past.0.s", "sink.3.k", "keys.0")
    assert {owner(name) for name in ("latents", "rays", f"{WEIGHT_PREFIX}final.weight")} == {"latents", "rays", f"{WEIGHT_PREFIX}final.weight"}


def test_cases_count_what_the_plan_does() -> None:
    found = {case.name: case for case in kernels_block.cases()}
    names = [f"{part}.{precision}" for precision in ("bf16", "fp8") for part in ("block.gdn", "block.softmax", "forward")]
    assert list(found) == names
    assert all(found[name].extra["launches"] <= 25 for name in names if name.startswith("block."))
    # At the data sheet's peaks the floor is that of `sanawm plan`, but for work in units that a benchmark does not measure.
    gpu = cost.GPUS["h200"]
    peaks = {kind: tera * 1e12 for kind, tera in gpu.tflops.items()}
    plan = kernels_block.forward(kernels_block.WorldConfig(), "fp8", 90)[0].plan
    assert found["forward.fp8"].floor(gpu.terabytes * 1e12, peaks) == pytest.approx(cost.cost(plan, gpu).floor_us, rel=1e-3)


def test_floors_of_several_launches_add_up() -> None:
    case = Case("x", lambda: (lambda: None, {}), work=(Work(1000, 0), Work(10, 600, "fp8")))
    assert case.floor(1e9, {"fp8": 2e8}) == pytest.approx(1.0 + 3.0)
    assert Case("x", lambda: (lambda: None, {}), 1000, 600).floor(1e9, {"bf16": 1e9}) == pytest.approx(1.0)


def test_the_forward_is_compared_with_its_blocks() -> None:
    rows: list[dict[str, Any]] = [{"case": name, "value": value} for name, value in (("block.gdn.fp8", 2.0), ("block.softmax.fp8", 3.0), ("forward.fp8", 60.0))]
    kernels_block.extrapolate(rows)
    assert rows[-1]["blocks"] == 15 * 2.0 + 5 * 3.0 and "blocks" not in rows[0]


def test_the_command_lists_cases_without_a_gpu() -> None:
    command = [sys.executable, kernels_block.__file__, "--dry-run", "--only", "gdn"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["block.gdn.bf16", "block.gdn.fp8"]
    assert "16 launches" in lines[0]

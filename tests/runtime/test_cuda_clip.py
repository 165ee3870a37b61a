"""Clips of the CUDA engine from picture and prompt, on a driver that checks every call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_fake

from sanawm.config import tiny_config
from sanawm_export.build import BuildRequest
from sanawm_export.cuda import build
from sanawm_export.cuda.bench import Bench, rows
from sanawm_export.cuda.cost import GPUS
from sanawm_export.cuda.synthetic import SyntheticCheckpoint
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime import world as worlds
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines.cuda import CudaEngine
from sanawm_runtime.targets import resolve_target

PROMPT = "a stone house at a lake"


def test_a_stream_starts_as_the_torch_models_say() -> None:
    """Both encoders and the prompt's keys, launch by launch from the raw parameters, by Triton's interpreter."""
    script = Path(__file__).with_name("cuda_clip_interpreted.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Float32 sums in another order through 15 layers.
    assert max(found["errors"].values()) < 1e-5
    assert {"text_encoder text", "image_encoder latents", "prompt_kv keys.0", "prompt_kv values.1"} <= set(found["errors"])
    assert found["launches"] > 50


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A synthetic bundle of the tiny world for Hopper, its kernels by name only."""

    def by_name(variants: Mapping[str, KernelVariant], target: int) -> Iterator[tuple[dict[str, Any], bytes]]:
        return ((cuda_fake.index_entry(variant, f"sm_{target}"), name.encode()) for name, variant in variants.items())

    request = BuildRequest(SyntheticCheckpoint(tiny_config(), 1), resolve_target("h200"), "cuda", "bf16")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compiled", by_name)
        return build.build_cuda_synthetic(request, tmp_path_factory.mktemp("clip") / "bundle", 1)


@pytest.fixture
def driver(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> cuda_fake.FakeDriver:
    """The driver on which worlds are opened."""
    entries = {entry["name"].encode(): entry for entry in json.loads(bundle.read("kernels/index.json"))["kernels"]}
    plans = [Plan.from_json(bundle.read(entry.file)) for entry in bundle.manifest.programs.values()]
    writes = {step.kernel: step.writes for plan in plans for step in plan.steps if isinstance(step, Launch)}
    made = cuda_fake.FakeDriver(entries, writes)
    monkeypatch.setattr(worlds, "open_engine", lambda bundle, threads: CudaEngine(bundle, Gpu(driver=made)))
    monkeypatch.setattr(worlds, "device_capability", lambda: "sm_90")
    return made


def test_a_bundle_makes_a_clip_from_picture_and_prompt(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    """Every call of a start and two chunks; the driver computes nothing, so the frames are only counted."""
    picture = np.zeros((200, 330, 3), np.uint8)
    with worlds.World.open(bundle.root, verify="full") as world:
        stream = world.start(picture, PROMPT)
        first = len(driver.launches)
        assert {launch.kernel.partition(".")[0] for launch in driver.launches} >= {"text", "image", "gemm"}
        chunks = list(stream.play("w", 2))
        assert [len(chunk.frames) for chunk in chunks] == [25, 24]
        assert chunks[0].frames.shape[1:] == (*world.image_size, 3)
        assert len(driver.launches) > first
        stream.close()
        del stream, chunks
    assert "cuDevicePrimaryCtxRelease" in driver.calls


def test_a_benchmark_times_the_encoders(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    """Of a driver that does nothing the times mean nothing; that there are some, with their floors, does."""
    engine = CudaEngine(bundle, Gpu(driver=driver))
    timed = Bench(bundle, 49, engine)
    timed.run()
    found = {row["case"]: row for row in rows(timed, GPUS["h200"])}
    for name in ("text_encoder", "image_encoder"):
        row = found[f"engine.{name}.bf16"]
        assert row["n"] == 5 and row["floor"] > 0
        assert name not in engine._programs
    engine.close()


def test_encoders_give_their_weights_back(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    """Each is a part of its own, so freeing it frees its weights; a repeated prompt needs no encoder."""
    picture = np.zeros((200, 330, 3), np.uint8)
    with worlds.World.open(bundle.root, free_encoders=True) as world:
        engine = world.engine
        assert isinstance(engine, CudaEngine)
        world.start(picture, PROMPT).close()
        assert set(engine._parts) == {"weights/dit.json"}
        launched = len(driver.launches)
        world.start(picture, PROMPT).close()
        again = [launch.kernel for launch in driver.launches[launched:]]
        assert not any(name.startswith("text.") for name in again) and any(name.startswith("image.") for name in again)

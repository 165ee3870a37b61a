"""Clips of the CUDA engine from picture and prompt, on a driver that checks every call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import cuda_fake
import engine_bundle
import engine_clip
import engine_numerics
import engine_short

from sanawm.config import preset, tiny_config
from sanawm.errors import BundleError, EngineError
from sanawm.programs import TensorSpec
from sanawm_export.build import BuildRequest
from sanawm_export.cuda import bench_endurance, build
from sanawm_export.cuda.bench import RUNS, Bench
from sanawm_export.cuda.bench_rows import all_operations, rows
from sanawm_export.cuda.bench_timeline import draw
from sanawm_export.cuda.cost import GPUS
from sanawm_export.cuda.synthetic import SyntheticCheckpoint, synthetic_seed
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime import world as worlds
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines._cuda_weights import contents, read_table
from sanawm_runtime.engines.cuda import ROW_BYTES, ROW_TABLES, CudaEngine
from sanawm_runtime.memory import device_memory
from sanawm_runtime.summary import bundle_summary
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


def test_final_latents_equal_the_torch_sampler() -> None:
    """benchmarks/engine_numerics.py: three chunks, encoders and two decoded latent frames, launch by launch by Triton's interpreter."""
    script = Path(__file__).with_name("cuda_numerics_interpreted.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kinds"] == ["first", "second", "steady"]
    parts = found["parts"]
    # Float32 sums in another order.
    assert max(*found["errors"], parts["text_encoder"], parts["image_encoder"]) < 1e-5
    # A value in the middle between two levels may be rounded either way.
    assert max(parts["decode_first"], parts["decode"]) < 1e-3


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


def test_a_benchmark_of_whole_clips(bundle: Any, driver: cuda_fake.FakeDriver, tmp_path: Path) -> None:
    """Of a driver that does nothing the times mean nothing; that there are some, with their floors, does."""
    engine = CudaEngine(bundle, Gpu(driver=driver))
    timed = Bench(bundle, 121, engine, clips=1)
    timed.run()
    found = {row["case"]: row for row in rows(timed, GPUS["h200"])}
    for name in ("text_encoder", "image_encoder"):
        row = found[f"engine.{name}.bf16"]
        assert row["n"] == RUNS and row["floor"] > 0
        assert name not in engine._programs
    assert found["engine.first_frame.bf16"]["n"] == RUNS
    assert found["engine.allocations.bf16"]["value"] == 0
    assert found["engine.memory.growth.bf16"]["value"] == 0
    endured = bench_endurance.run(timed, 11)
    assert len(endured.period) == 10 and [state.chunks for state in endured.states] == [5, 10, 11]
    found |= {row["case"]: row for row in bench_endurance.rows(endured, "bf16")}
    assert found["engine.endurance.allocations.bf16"]["value"] == found["engine.endurance.growth.bf16"]["value"] == 0
    assert {span.stage for span in timed.times.spans} == {"camera", "denoise", "decode", "copy"}
    draw(tmp_path / "timeline.png", timed.times.spans, "nothing")
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    names = {row["case"] for row in all_operations(timed, GPUS["h200"], 2)}
    assert "engine.denoise_steady.gdn.merged.bf16" in names and any(name.startswith("engine.decode.conv.causal") for name in names)
    del timed
    engine.close()


def test_programs_are_timed_on_the_stream_that_they_run_on(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    engine = CudaEngine(bundle, Gpu(driver=driver))
    for name, entry in bundle.manifest.programs.items():
        buffers = {t.name: engine.allocate(TensorSpec(t.name, t.dtype, t.shape)) for t in (*entry.inputs, *entry.outputs)}
        launched = len(driver.launches)
        engine.run(name, buffers)
        assert {launch.stream for launch in driver.launches[launched:]} == {engine._streams[engine.stream_of(name)]}, name
    del buffers
    engine.close()


def test_weights_in_files_are_of_the_same_checkpoint(bundle: Any, tmp_path: Path) -> None:
    """benchmarks/engine_bundle.py: what a bundle with weights in files holds is what the one with a seed makes."""
    written: dict[bytes, Path] = {}
    found = [engine_bundle.stored(bundle, tmp_path / name, written) for name in ("one", "two")]
    assert engine_numerics.common_seed([bundle, *found]) == 1
    for name in (name for name in bundle.manifest.files if name.startswith("weights/")):
        made, stored = (contents(read_table(source.read(name), name), source) for source in (bundle, found[1]))
        assert all(a.name == b.name and np.array_equal(x, y) for (a, x), (b, y) in zip(made, stored, strict=True))
        assert os.path.samefile(*(other.root / name.replace(".json", ".safetensors") for other in found))


def test_only_bundles_of_one_synthetic_checkpoint_are_compared(bundle: Any) -> None:
    assert synthetic_seed(SyntheticCheckpoint(preset("full"), 7).source) == 7  # type: ignore[arg-type]
    other = replace(bundle.manifest, checkpoint=replace(bundle.manifest.checkpoint, source="synthetic:tiny:2"))
    with pytest.raises(SystemExit, match="synthetic:tiny:1, synthetic:tiny:2"):
        engine_numerics.common_seed([bundle, SimpleNamespace(manifest=other)])  # type: ignore[list-item]


def test_memory_is_known_before_anything_is_loaded(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    """What inspect says is what the engine has asked for once everything is resident, but for what passes through the encoders."""
    needed = device_memory(bundle)
    assert needed is not None and set(needed.weights) == {"transformer", "decoder", "text encoder", "image encoder"}
    with worlds.World.open(bundle.root) as world:
        picture = np.zeros((*world.image_size, 3), np.uint8)
        passing = [spec for name in ("text_encoder", "image_encoder") for spec in (*world.programs[name].inputs, *world.programs[name].outputs)]
        most = sum(spec.nbytes for spec in passing) + ROW_BYTES * ROW_TABLES
        engine: Any = world.engine
        with world.start(picture, PROMPT) as stream:
            for _ in stream.play("w", 3):
                pass
            assert needed.whole <= engine.device.held_bytes <= needed.whole + most
            world.engine.unload("text_encoder")
            world.engine.unload("image_encoder")
            assert needed.streaming <= engine.device.held_bytes <= needed.streaming + most
    assert bundle_summary(bundle)["device_memory"]["whole"] == needed.whole


@pytest.mark.parametrize(
    ("program", "change", "message"),
    [
        ("denoise_steady", {"extras": {"arena": "1"}}, "denoise_steady: the manifest gives no size of its scratch memory"),
        ("text_encoder", {"inputs": ()}, "program text_encoder has other inputs"),
    ],
)
def test_memory_of_a_manifest_that_is_not_ours(bundle: Any, program: str, change: dict[str, Any], message: str) -> None:
    programs = bundle.manifest.programs
    changed = {**programs, program: replace(programs[program], **change)}
    other: Any = SimpleNamespace(root="b", read=bundle.read, manifest=replace(bundle.manifest, programs=changed))
    with pytest.raises(BundleError, match=message):
        device_memory(other)


def test_a_bundle_that_does_not_fit_is_refused_before_it_is_read(bundle: Any, driver: cuda_fake.FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = device_memory(bundle)
    assert needed is not None and needed.streaming < needed.whole
    free = needed.whole - 1
    monkeypatch.setattr(driver, "cuMemGetInfo", lambda: (0, free, needed.whole), raising=False)
    with pytest.raises(EngineError, match=r"needs .* of device memory \(.*text encoder .*\), found .* free; open it with free_encoders .* or close other"):
        worlds.World.open(bundle.root)
    assert not driver.launches and "cuMemAlloc" not in driver.calls
    with worlds.World.open(bundle.root, free_encoders=True) as world:
        world.warm_up()
        assert not {"text_encoder", "image_encoder"} & world.engine._programs.keys()  # type: ignore[attr-defined]
    free = needed.streaming - 1
    with pytest.raises(EngineError, match=r"free; close other programs$"):
        worlds.World.open(bundle.root, free_encoders=True)


def test_a_short_run_refuses_frames_that_nobody_made(bundle: Any, driver: cuda_fake.FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/engine_short.py, on a driver that computes nothing: every call of a start and a chunk, and no result."""
    with pytest.raises(SystemExit, match="chunk 0 of .* is not what a model makes"):
        engine_short.run(bundle.root)
    assert {launch.kernel.partition(".")[0] for launch in driver.launches} >= {"text", "image", "gemm", "conv"}


RACES = """========= Error: Potential RAW hazard detected at __shared__ 0x1{digit} in block (0,0,0) :
=========     Write Thread (127,0,0) at gemm+0x35d0
=========     Read Thread (352,0,0) at gemm+0x120
========= Warning: (Warp Level Programming) Potential WAW hazard detected (invalid memcpy_async synchronization) at __shared__ 0x760 in block (0,1,0) :
=========     Write Thread (192,0,0) at {kernel}+0x400
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def _beside(*stores: str) -> str:
    """RACES, and of the same kernel's first four warps stores below the hand-over, at these places of its code."""
    report = "========= Error: Potential RAW hazard detected at __shared__ 0x900 in block (0,0,0) :\n"
    report += "=========     Write Thread (12,0,0) at gemm+{}\n=========     Read Thread (300,0,0) at gemm+0x10\n"
    whole = RACES.splitlines(keepends=True)
    return "".join([*whole[:3], *(report.format(store) for store in stores), whole[-1]])


@pytest.mark.parametrize(
    ("digit", "kernel", "text", "message"),
    [
        ("3f7", "gemm", "\n".join(RACES.splitlines()[:3] + RACES.splitlines()[5:]), "racecheck found hazards"),  # below the hand-over
        ("3ff", "combine", RACES, "racecheck found hazards"),
        ("3ff", "gemm", "\n".join(RACES.splitlines()[:3]), "ends before racecheck's summary"),
        ("3ff", "gemm", "\n".join(RACES.splitlines()[:3] + RACES.splitlines()[5:]), None),
        ("3ff", "gemm", _beside("0x400"), "hazards"),
        ("3ff", "gemm", _beside("0x3610"), None),
        ("3ff", "gemm", _beside("0x35a0", "0x3640", "0x3610"), None),
        ("3ff", "gemm", _beside("0x3640", "0x3690"), "hazards"),  # neither follows the hand-over, nor a store that does
    ],
)
def test_races_of_kernels_are_told_from_the_compilers(tmp_path: Path, digit: str, kernel: str, text: str, message: str | None) -> None:
    """benchmarks/engine_short.py, on reports in the form of compute-sanitizer 2025.3."""
    (tmp_path / "kernels").mkdir()
    rows = [{"entry": "gemm", "num_warps": 12, "shared_bytes": 4096}, {"entry": "combine", "num_warps": 8, "shared_bytes": 4096}]
    (tmp_path / "kernels" / "index.json").write_text(json.dumps({"kernels": rows}))
    (tmp_path / "log").write_text(text.format(digit=digit, kernel=kernel))
    if message is None:
        engine_short.races(tmp_path / "log", tmp_path)
        return
    with pytest.raises(SystemExit, match=message):
        engine_short.races(tmp_path / "log", tmp_path)


def test_a_benchmark_of_clips_to_mp4(bundle: Any, driver: cuda_fake.FakeDriver, tmp_path: Path) -> None:
    """The product's own path: every clip is a whole video, and later chunks allocate nothing."""
    reports, found = engine_clip.warm(bundle.root, 97, tmp_path, 2)
    assert [report["frames"] for report in reports] == [97, 97]
    assert all(0 < report["start_s"] < report["first_frame_s"] < report["total_s"] for report in reports)
    assert found["recipe"] == "bf16" and found["memory"]["used_bytes"] > 0


def test_a_warm_world_has_recorded_what_the_next_streams_run(bundle: Any, driver: cuda_fake.FakeDriver) -> None:
    made = ("cuMemAlloc", "cuMemHostAlloc", "cuGraphInstantiate", "cuModuleLoadData")
    with worlds.World.open(bundle.root) as world:
        world.warm_up()
        counts = [driver.calls.count(name) for name in made]
        for prompt in (PROMPT, "Another street."):
            with world.start(np.zeros((200, 330, 3), np.uint8), prompt) as stream:
                assert sum(1 for _ in stream.play("w", chunks=6)) == 6
            assert [driver.calls.count(name) for name in made] == counts


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
        for recorded in (1, 0):  # freeing an encoder costs nobody a chunk's graph
            with world.start(picture, PROMPT) as stream:
                made = driver.calls.count("cuGraphInstantiate")
                stream.hold("w")
                assert (driver.calls.count("cuGraphInstantiate") > made) is bool(recorded)

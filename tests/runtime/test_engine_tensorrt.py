"""The TensorRT executor on a GPU in host memory: binding, rounding, CUDA graphs, shared memory, compiled code kept between runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from trt_fake import FakeDriver, FakeEngine, fake_library

from sanawm.bfloat16 import from_bits, to_bits
from sanawm.config import tiny_config
from sanawm.errors import BundleError, EngineError
from sanawm.programs import TensorSpec
from sanawm_export.bundle_writer import BundleWriter
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, ProgramEntry, TargetEntry, TensorEntry
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.engines._trt_device import Device
from sanawm_runtime.engines._trt_library import RTX_VERSION
from sanawm_runtime.engines.tensorrt import TensorRTEngine

LATENTS = (1, 2, 3, 4, 4)
SIZES = (1, 1, 3, 1, 1)
TABLES: dict[str, list[list[Any]]] = {
    "double": [["x", "bfloat16", [2, 3], True], ["flag", "bool", [1], True], ["y", "float32", [2, 3], False]],
    "big": [["y", "float32", [2, 3], True], ["z", "float32", [2, 3], False]],
    "euler_steady": [
        ["latents", "bfloat16", list(LATENTS), True],
        ["velocity", "bfloat16", list(LATENTS), True],
        ["sizes", "float32", list(SIZES), True],
        ["stepped", "bfloat16", list(LATENTS), False],
    ],
}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"y": 2 * from_bits(inputs["x"]) + inputs["flag"]}


def euler(inputs: dict[str, Any]) -> dict[str, Any]:
    x, v, sizes = from_bits(inputs["latents"]), from_bits(inputs["velocity"]), inputs["sizes"]
    return {"stepped": np.where(sizes == 0, inputs["latents"], to_bits(x - sizes * v))}


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {"double": double, "big": lambda t: {"z": t["y"] + 1}, "euler_steady": euler}


def write_bundle(
    root: Path, records: dict[str, Any] | None = None, version: str = RTX_VERSION, engine: Any = "tensorrt_rtx", weights: int = 0
) -> Bundle:
    entries = {}
    with BundleWriter(root) as writer:
        for name, table in TABLES.items():
            record = {"name": name, "compute": name, "table": table, "memory": 4096 if name == "big" else 1024, "weights": weights}
            record |= (records or {}).get(name, {})
            writer.add_bytes(f"engines/{name}.engine", json.dumps(record).encode())
            sides = [tuple(TensorEntry(n, d, tuple(s)) for n, d, s, is_input in table if is_input == side) for side in (True, False)]
            entries[name] = ProgramEntry(f"engines/{name}.engine", *sides, {"weight_bytes": weights})
        manifest = Manifest(
            name="tiny", created=utc_now(), config=tiny_config(), target=TargetEntry("rtx5090", engine, "sm_120"),
            precision=PrecisionEntry("bf16"), programs=entries, files={}, versions={engine: version}, checkpoint=CheckpointEntry("synth", "tiny"),
        )  # fmt: skip
        return writer.finish(manifest)


class Opened:
    """An engine on a bundle, with what it runs on."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        self.driver = FakeDriver(**options.pop("gpu", {}))
        self.library = fake_library(self.driver, PROGRAMS)
        self.engine = TensorRTEngine(bundle, device=Device(driver=self.driver), library=self.library, **options)

    def buffers(self, program: str, **values: Any) -> dict[str, Any]:
        made = {n: self.engine.allocate(TensorSpec(n, d, tuple(s))) for n, d, s, _ in TABLES[program]}
        for name, array in values.items():
            self.engine.write(made[name], np.asarray(array))
        return made

    def engine_of(self, program: str) -> FakeEngine:
        found: FakeEngine = self.library.module.engines[program]
        return found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def opened(bundle: Bundle) -> Opened:
    return Opened(bundle)


def test_runs_by_name_and_rounds_to_bfloat16(opened: Opened) -> None:
    x = np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3) + np.float32(1e-3)
    buffers = opened.buffers("double", x=x, flag=[True])
    opened.engine.run("double", buffers)
    rounded = from_bits(to_bits(x))
    assert (rounded != x).any()
    np.testing.assert_array_equal(opened.engine.read(buffers["x"]), rounded)
    np.testing.assert_array_equal(opened.engine.read(buffers["y"]), 2 * rounded + 1)


def test_graphs_are_recorded_once_for_each_set_of_buffers(opened: Opened) -> None:
    sets = [opened.buffers("double", x=np.full((2, 3), i), flag=[False]) for i in range(2)]
    for turn in range(6):
        buffers = sets[turn % 2]
        opened.engine.write(buffers["x"], np.full((2, 3), turn, np.float32))
        opened.engine.run("double", buffers)
        np.testing.assert_array_equal(opened.engine.read(buffers["y"]), np.full((2, 3), 2 * turn))
    # Each set: enqueued once, recorded once, and replayed from then on.
    assert opened.engine_of("double").contexts[0].enqueued == 4
    assert opened.driver.calls.count("cuGraphInstantiate") == 2
    assert opened.driver.calls.count("cuGraphLaunch") == 4


def test_programs_that_cannot_be_recorded_are_enqueued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = Opened(write_bundle(tmp_path / "b", {"double": {"capturable": False}}))
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    for _ in range(3):
        opened.engine.run("double", buffers)
    assert opened.engine_of("double").contexts[0].enqueued == 3
    assert "cuStreamBeginCapture" not in opened.driver.calls
    assert "cannot be recorded" in caplog.text


def test_graphs_of_streams_that_ended_are_dropped(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sanawm_runtime.engines._trt_program._GRAPHS", 2)
    sets = [opened.buffers("double", x=np.ones((2, 3)), flag=[False]) for _ in range(4)]
    for buffers in sets:
        opened.engine.run("double", buffers)
        opened.engine.run("double", buffers)
    assert opened.driver.calls.count("cuGraphExecDestroy") == 2


def test_programs_share_one_block_of_memory(opened: Opened) -> None:
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    for _ in range(2):
        opened.engine.run("double", buffers)
    small = opened.engine_of("double").contexts[0]
    assert small.block[1] == 1024
    opened.engine.run("big", {"y": buffers["y"], "z": opened.engine.allocate(TensorSpec("z", "float32", (2, 3)))})
    # The larger one replaced the block, and the graph that pointed into the old one is gone.
    assert small.block == opened.engine_of("big").contexts[0].block and small.block[1] == 4096
    assert opened.driver.calls.count("cuGraphExecDestroy") == 1
    opened.engine.run("double", buffers)
    assert opened.engine.read(buffers["y"])[0, 0] == 2


@pytest.mark.parametrize("keep_first", [False, True])
def test_euler_steps_on_the_device(opened: Opened, keep_first: bool) -> None:
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal(LATENTS).astype(np.float32) for _ in range(2))
    latents, velocity = (opened.engine.allocate(TensorSpec(n, "bfloat16", LATENTS)) for n in ("latents", "velocity"))
    opened.engine.write(latents, x)
    opened.engine.write(velocity, v)
    before = opened.engine.read(latents)
    expected = from_bits(to_bits(before - np.float32(0.04) * opened.engine.read(velocity)))
    if keep_first:
        expected[:, :, 0] = before[:, :, 0]
    opened.engine.euler(latents, velocity, 0.04, keep_first)
    np.testing.assert_array_equal(opened.engine.read(latents), expected)


def test_compiled_code_is_kept_beside_the_bundle(bundle: Bundle) -> None:
    first = Opened(bundle)
    first.engine.run("double", first.buffers("double", x=np.ones((2, 3)), flag=[False]))
    assert first.engine_of("double").configs[0].cache.taken is None  # type: ignore[union-attr]
    path = bundle.root.with_name("bundle.jit") / "NVIDIA-GeForce-RTX-5090-13.1" / "double"
    assert path.is_file()
    second = Opened(bundle)
    second.engine.load("double")
    assert second.engine_of("double").configs[0].cache.taken == b"compiled for an RTX 5090"  # type: ignore[union-attr]


def rewritten(path: Path, **changes: Any) -> None:
    head, data = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps(json.loads(head) | changes).encode() + b"\n" + data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: rewritten(path, driver="12.9"),
        lambda path: rewritten(path, library="TensorRT-RTX 1.6.0"),
        lambda path: rewritten(path, engine="0" * 64),
        lambda path: path.write_bytes(path.read_bytes() + b"!"),
        lambda path: path.write_bytes(b"not JSON"),
        lambda path: path.chmod(0o666),
    ],
    ids=["driver", "library", "engine", "content", "junk", "writable by others"],
)
def test_compiled_code_that_does_not_fit_is_not_used(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    opened = Opened(bundle)
    opened.engine.run("double", opened.buffers("double", x=np.ones((2, 3)), flag=[False]))
    damage(bundle.root.with_name("bundle.jit") / "NVIDIA-GeForce-RTX-5090-13.1" / "double")
    again = Opened(bundle)
    again.engine.load("double")
    assert again.engine_of("double").configs[0].cache.taken is None  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written_costs_only_time(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    opened = Opened(bundle, jit_folder=tmp_path / "file")
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    opened.engine.run("double", buffers)
    assert opened.engine.read(buffers["y"])[0, 0] == 2
    assert "cannot be written" in caplog.text


def test_buffers_and_closing_give_the_memory_back(opened: Opened) -> None:
    free = opened.driver.free
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    opened.engine.run("double", buffers)
    del buffers
    assert opened.driver.free == free - 1024
    kept = opened.buffers("big")
    opened.engine.close()
    assert opened.driver.free == free and not opened.driver.memory
    del kept  # memory is not given back twice
    with pytest.raises(EngineError, match="closed"):
        opened.engine.load("double")


def test_unloading_and_loading_again(opened: Opened) -> None:
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    for _ in range(2):
        opened.engine.run("double", buffers)
    opened.engine.unload("double")
    opened.engine.unload("double")
    assert opened.driver.calls.count("cuGraphExecDestroy") == 1
    opened.engine.run("double", buffers)
    assert opened.engine.read(buffers["y"])[0, 0] == 2


def test_programs_make_room_for_each_other(tmp_path: Path) -> None:
    weights = 300 * 2**20
    bundle = write_bundle(tmp_path / "b", weights=weights)
    opened = Opened(bundle, gpu={"memory": 900 * 2**20})

    def loaded() -> set[str]:
        return set(opened.library.module.engines)

    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    z = opened.engine.allocate(TensorSpec("z", "float32", (2, 3)))
    opened.engine.run("double", buffers)
    opened.engine.run("big", {"y": buffers["y"], "z": z})
    assert loaded() == {"double", "big"}
    opened.engine.run("double", buffers)
    opened.engine.load("euler_steady")
    assert loaded() == {"double", "euler_steady"}, "big was not used for longest"
    opened.engine.run("big", {"y": buffers["y"], "z": z})
    assert loaded() == {"euler_steady", "big"}
    assert opened.engine.read(z)[0, 0] == 3


def test_buffers_that_do_not_fit(opened: Opened) -> None:
    buffers = opened.buffers("double")
    with pytest.raises(EngineError, match=r"double needs a buffer for 'flag'"):
        opened.engine.run("double", {name: b for name, b in buffers.items() if name != "flag"})
    wrong = opened.engine.allocate(TensorSpec("x", "float32", (2, 3)))
    with pytest.raises(EngineError, match=r"takes bfloat16\[2, 3\] for 'x', found float32\[2, 3\]"):
        opened.engine.run("double", buffers | {"x": wrong})
    with pytest.raises(EngineError, match=r"takes shape \(2, 3\), found \(3,\)"):
        opened.engine.write(buffers["x"], np.ones(3))


def test_failures_of_the_library_and_the_gpu(opened: Opened) -> None:
    buffers = opened.buffers("double", x=np.ones((2, 3)), flag=[False])
    opened.engine.load("double")
    opened.engine_of("double").fails = True
    with pytest.raises(EngineError, match="failed in double: it gave no reason"):
        opened.engine.run("double", buffers)
    with pytest.raises(EngineError, match=r"no room for 2\.00 GiB more \(1\.00 GiB free\)"):
        opened.engine.allocate(TensorSpec("huge", "uint8", (1 << 31,)))
    with pytest.raises(EngineError, match="no program 'missing'"):
        opened.engine.load("missing")


def test_an_engine_with_another_signature_is_refused(tmp_path: Path) -> None:
    table = [["x", "bfloat16", [2, 4], True], *TABLES["double"][1:]]
    opened = Opened(write_bundle(tmp_path / "b", {"double": {"table": table}}))
    with pytest.raises(BundleError, match=r"program double: the manifest has bfloat16\[2, 3\] for 'x', and the engine bfloat16\[2, 4\]"):
        opened.engine.load("double")


def test_wrong_gpu_version_and_engine(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(EngineError, match=r"for sm_120, and the GPU here is sm_90; build one with `sanawm build-engine --target sm_90`"):
        Opened(bundle, gpu={"capability": (9, 0)})
    with pytest.raises(BundleError, match=rf"built with tensorrt_rtx 1\.6\.0, found {RTX_VERSION} here"):
        Opened(write_bundle(tmp_path / "old", version="1.6.0"))
    with pytest.raises(EngineError, match="needs the cuda engine"):
        Opened(write_bundle(tmp_path / "cuda", engine="cuda"))


def test_a_changed_engine_file_never_reaches_the_library(bundle: Bundle) -> None:
    path = bundle.root / "engines/double.engine"
    path.write_bytes(path.read_bytes().replace(b"1024", b"1025"))
    opened = Opened(bundle)
    with pytest.raises(BundleError, match="SHA-256"):
        opened.engine.load("double")
    assert "double" not in opened.library.module.engines

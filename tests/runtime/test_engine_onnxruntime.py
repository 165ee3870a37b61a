"""ONNX Runtime engine on a bundle of small graphs: buffers, runs, and every way in which it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save as save_tensors

from sanawm.config import tiny_config
from sanawm.errors import BundleError, EngineError
from sanawm.programs import TensorSpec
from sanawm_export.bundle_writer import BundleWriter
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, ProgramEntry, TargetEntry
from sanawm_runtime.engines import open_engine
from sanawm_runtime.engines.onnxruntime import OnnxRuntimeEngine

X, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (2, 3))


def graph(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto) -> bytes:
    """A graph from x to y, both (2, 3)."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy")
    made = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()


def external(weights: bytes) -> onnx.TensorProto:
    """`w`, the last three numbers of the safetensors file beside the graph."""
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "shared.safetensors", "offset": str(len(weights) - 12), "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture(scope="module")
def bundle_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = save_tensors({"w": np.array([1.0, 2.0, 3.0], np.float32)})
    # An index that comes from the input, so that a wrong one shows at run time.
    gather = [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64), helper.make_node("GatherElements", ["x", "i"], ["y"])]
    files = {"broken": b"not a graph", "fails": graph(gather)}
    for name, operator in (("add", "Add"), ("multiply", "Mul")):
        files[name] = graph([helper.make_node(operator, ["x", "w"], ["y"])], external(weights))
    out = tmp_path_factory.mktemp("engine") / "bundle"
    with BundleWriter(out) as writer:
        writer.add_bytes("programs/shared.safetensors", weights)
        for name, data in files.items():
            writer.add_bytes(f"programs/{name}.onnx", data)
        extras = {"weights": "programs/shared.safetensors"}
        programs = {name: ProgramEntry(f"programs/{name}.onnx", (), (), extras if name in ("add", "multiply") else {}) for name in files}
        target, precision = TargetEntry("cpu", "onnxruntime"), PrecisionEntry("fp32")
        source = CheckpointEntry("synth", "tiny")
        writer.finish(Manifest("probe", "2026-11-23T06:00:00Z", tiny_config(), target, precision, programs, {}, {}, source))
    return out


@pytest.fixture
def engine(bundle_root: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(Bundle.open(bundle_root))


def buffers(engine: OnnxRuntimeEngine, x: np.ndarray | None = None) -> dict[str, Any]:
    made = {"x": engine.allocate(X), "y": engine.allocate(Y)}
    engine.write(made["x"], np.arange(6, dtype=np.float32).reshape(2, 3) if x is None else x)
    engine.write(made["y"], np.full((2, 3), np.nan, np.float32))
    return made


def test_programs_share_a_weight_file(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = Bundle.open_verified

    def spy(self: Bundle, name: str) -> memoryview:
        hashed.append(name)
        return real(self, name)

    monkeypatch.setattr(Bundle, "open_verified", spy)
    bound = buffers(engine)
    engine.run("add", bound)
    np.testing.assert_array_equal(engine.read(bound["y"]), [[1, 3, 5], [4, 6, 8]])
    engine.run("multiply", bound)
    np.testing.assert_array_equal(engine.read(bound["y"]), [[0, 2, 6], [3, 8, 15]])
    assert hashed == ["programs/shared.safetensors"]


def test_results_land_in_the_bound_buffer(engine: OnnxRuntimeEngine) -> None:
    bound = buffers(engine)
    engine.run("add", bound)
    before = engine.read(bound["y"])
    engine.write(bound["x"], np.zeros((2, 3), np.float32))
    engine.run("add", bound)
    np.testing.assert_array_equal(engine.read(bound["y"]), [[1, 2, 3]] * 2)
    # What was read is a copy.
    np.testing.assert_array_equal(before, [[1, 3, 5], [4, 6, 8]])
    # One program's output is the next one's input, in place.
    engine.run("multiply", {"x": bound["y"], "y": bound["x"]})
    np.testing.assert_array_equal(engine.read(bound["x"]), [[1, 4, 9]] * 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "uint8"])
def test_every_dtype_comes_back(dtype: str, engine: OnnxRuntimeEngine) -> None:
    buffer = engine.allocate(TensorSpec("t", dtype, (2, 2)))
    values = np.array([[0, 1], [1, 0]]).astype("float32" if dtype == "bfloat16" else dtype)
    engine.write(buffer, values)
    found = engine.read(buffer)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_bfloat16_rounds_on_the_way_in(engine: OnnxRuntimeEngine) -> None:
    buffer = engine.allocate(TensorSpec("t", "bfloat16", (3,)))
    values = np.array([1.001, np.pi, -1e30], np.float32)
    engine.write(buffer, values)
    np.testing.assert_array_equal(engine.read(buffer), torch.from_numpy(values).bfloat16().float().numpy())


def test_a_transposed_array_is_written_as_it_reads(engine: OnnxRuntimeEngine) -> None:
    buffer = engine.allocate(X)
    engine.write(buffer, np.arange(6, dtype=np.float32).reshape(3, 2).T)
    np.testing.assert_array_equal(engine.read(buffer), [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_euler(dtype: str, keep_first: bool, engine: OnnxRuntimeEngine) -> None:
    spec = TensorSpec("t", dtype, (1, 2, 3, 2, 2))
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal(spec.shape).astype(np.float32) for _ in range(2))
    latents, velocity = engine.allocate(spec), engine.allocate(replace(spec, name="v"))
    engine.write(latents, x)
    engine.write(velocity, v)
    before = engine.read(latents)
    engine.euler(latents, velocity, 0.071, keep_first)
    expected = before - np.float32(0.071) * engine.read(velocity)
    if dtype == "bfloat16":
        expected = torch.from_numpy(expected).bfloat16().float().numpy()
    if keep_first:
        expected[:, :, 0] = before[:, :, 0]
    found = engine.read(latents)
    assert found.tobytes() == expected.tobytes()
    assert (found[:, :, 0].tobytes() == before[:, :, 0].tobytes()) == keep_first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.allocate(TensorSpec("t", "float16", (1,))), "provider cannot hold t in float16; build the bundle with --precision fp32 or bf16"),
        (lambda e: e.write(e.allocate(X), np.zeros((3, 2), np.float32)), r"x takes shape \(2, 3\), found \(3, 2\)"),
        (lambda e: e.run("nothing", {}), "the bundle has no program 'nothing'; rebuild it"),
        (lambda e: e.load("broken"), r"cannot load programs/broken\.onnx: .*; rebuild the bundle"),
        (lambda e: e.run("add", {"x": e.allocate(X)}), "add needs a buffer for 'y', and none was bound"),
        (lambda e: e.run("add", {"y": e.allocate(Y)}), "add needs a buffer for 'x', and none was bound"),
        (lambda e: e.run("fails", buffers(e, np.full((2, 3), 9, np.float32))), "ONNX Runtime failed in fails: "),
        (lambda e: e.run("add", buffers(e) | {"y": e.allocate(TensorSpec("y", "float32", (3, 3)))}), "ONNX Runtime failed in add: "),
    ],
    ids=["dtype", "shape", "unknown", "damaged", "no-output", "no-input", "failure", "misfit"],
)
def test_refusals(call: Callable[[OnnxRuntimeEngine], object], message: str, engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        call(engine)
    assert "\n" not in str(caught.value)


def test_it_goes_on_after_a_failure(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError):
        engine.run("fails", buffers(engine, np.full((2, 3), 9, np.float32)))
    bound = buffers(engine, np.zeros((2, 3), np.float32))
    engine.run("fails", bound)
    engine.run("add", bound)
    np.testing.assert_array_equal(engine.read(bound["y"]), [[1, 2, 3]] * 2)


def test_unload_and_load(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Bundle.read

    def spy(self: Bundle, name: str) -> bytes:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(Bundle, "read", spy)
    engine.load("add")
    engine.load("add")
    assert read == ["programs/add.onnx"]
    engine.unload("add")
    engine.unload("never loaded")
    bound = buffers(engine)
    engine.run("add", bound)
    assert read == ["programs/add.onnx"] * 2
    np.testing.assert_array_equal(engine.read(bound["y"])[0], [1, 3, 5])


def test_closed(engine: OnnxRuntimeEngine) -> None:
    engine.load("add")
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed; open the world again"):
        engine.run("add", buffers(engine))


@pytest.mark.parametrize("name", ["shared.safetensors", "add.onnx"])
def test_a_changed_byte_is_never_used(name: str, bundle_root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_root, copy)
    data = bytearray((copy / "programs" / name).read_bytes())
    data[-1] ^= 1
    (copy / "programs" / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"programs/{name} has SHA-256"):
        OnnxRuntimeEngine(Bundle.open(copy)).load("add")


def test_the_library_is_missing(bundle_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"ONNX Runtime, which is not installed; run `pip install 'sanawm\[cpu\]'`"):
        open_engine(Bundle.open(bundle_root))


def test_one_thread_pool_for_the_process(bundle_root: Path) -> None:
    """In a process of its own: the pool cannot be made again."""
    program = f"""
from sanawm.errors import EngineError
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines.onnxruntime import OnnxRuntimeEngine
bundle = Bundle.open({str(bundle_root)!r})
engines = [OnnxRuntimeEngine(bundle, threads) for threads in (1, 1, None)]
for engine in engines:
    engine.load("add")
try:
    OnnxRuntimeEngine(bundle, 2)
except EngineError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "this process already computes with 1 threads, found a request for 2; use one number", result.stderr

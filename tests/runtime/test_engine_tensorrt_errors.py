"""What the real library says on a machine without a GPU, and what we make of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from trt_fake import FakeDriver

from sanawm.config import tiny_config
from sanawm.errors import EngineError
from sanawm.programs import Geometry
from sanawm_export.tensorrt import network
from sanawm_export.tensorrt.euler import euler_programs, write_euler
from sanawm_runtime.device import device_capability
from sanawm_runtime.engines import _trt_library as library_module
from sanawm_runtime.engines._trt_device import Device, load_driver
from sanawm_runtime.engines._trt_library import RTX_VERSION, check_version, logger, open_library, refuse_invalid


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real engine of the smallest program."""
    folder = tmp_path_factory.mktemp("engine")
    program = euler_programs(Geometry(tiny_config(), 16, dtype="bfloat16"))["euler_steady"]
    write_euler(program, folder / "euler.onnx")
    library, pieces = open_library("tensorrt_rtx"), []
    parsed = network.parse(library, (folder / "euler.onnx").read_bytes(), folder)
    network.serialize(library, parsed, network.configure(library, parsed, "sm_120", network.BuildOptions()), lambda data: pieces.append(bytes(data)))
    return b"".join(pieces)


@pytest.fixture(scope="module")
def runtime() -> Any:
    library = open_library("tensorrt_rtx")
    return library.module.Runtime(logger(library)[0])


def test_this_machine_has_no_gpu() -> None:
    # The other tests here describe such a machine.
    assert device_capability() is None


def test_no_driver_is_one_sentence() -> None:
    with pytest.raises(EngineError, match=r"^no NVIDIA driver was found here; install one and check it with `nvidia-smi`$"):
        load_driver()
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        Device()


def test_a_sound_engine_without_a_driver(engine: bytes, runtime: Any) -> None:
    with pytest.raises(EngineError, match=rf"^TensorRT-RTX {re.escape(RTX_VERSION)} cannot load e\.engine: .*CUDA.*driver"):
        refuse_invalid(open_library("tensorrt_rtx"), runtime, engine, "e.engine")


@pytest.mark.parametrize("data", [b"", b"x" * 400, b"\x7fELF" + bytes(300)], ids=["empty", "junk", "other"])
def test_what_is_not_an_engine(runtime: Any, data: bytes) -> None:
    with pytest.raises(EngineError, match="it is not an engine of this library; rebuild the bundle"):
        refuse_invalid(open_library("tensorrt_rtx"), runtime, data, "e.engine")


def test_an_engine_of_another_version_is_named_so(engine: bytes, runtime: Any) -> None:
    # The header holds the version that built it, one byte a number.
    place = engine.index(bytes(map(int, RTX_VERSION.split("."))))
    changed = engine[:place] + bytes((1, 6, 0, 11)) + engine[place + 4 :]
    with pytest.raises(EngineError, match="created with TensorRT-RTX version"):
        refuse_invalid(open_library("tensorrt_rtx"), runtime, changed, "e.engine")


def test_a_cut_engine_is_refused_by_the_library(engine: bytes, runtime: Any) -> None:
    _, messages = logger(open_library("tensorrt_rtx"))
    messages.take()
    assert runtime.deserialize_cuda_engine(engine[:-100]) is None
    assert "Serialization assertion" in messages.error()


@pytest.mark.parametrize(
    ("capability", "advice"),
    [
        ("UNSUPPORTED_CC", "rebuild the bundle for this one"),
        ("VERSION_MISMATCH", "install that version or rebuild"),
        ("OLD_CUDA_DRIVER", "the NVIDIA driver is too old; update it"),
        ("INSUFFICIENT_GPU_MEMORY", "close other programs"),
    ],
)
def test_each_diagnosis_has_its_advice(capability: str, advice: str) -> None:
    library = open_library("tensorrt_rtx")
    members = list(library.module.EngineInvalidityDiagnostics.__members__)
    answer = (library.module.EngineValidity.INVALID, 1 << members.index(capability))
    with pytest.raises(EngineError, match=advice):
        refuse_invalid(library, SimpleNamespace(get_engine_validity=lambda data: answer), b"", "e.engine")


def test_versions_of_the_library() -> None:
    with pytest.raises(EngineError, match=rf"expected TensorRT-RTX {re.escape(RTX_VERSION)}, found 1\.6\.0\.9; run `pip install tensorrt-rtx"):
        check_version("tensorrt_rtx", SimpleNamespace(__version__="1.6.0.9"))
    with pytest.raises(EngineError, match=r"expected TensorRT 11\.0 or newer, found 10\.16\.1; run `pip install"):
        check_version("tensorrt", SimpleNamespace(__version__="10.16.1"))
    assert check_version("tensorrt", SimpleNamespace(__version__="11.3.0.13")).title == "TensorRT 11.3.0.13"


@pytest.mark.parametrize("error", [ModuleNotFoundError("x", name="tensorrt"), ImportError("libnvinfer.so.11: cannot open shared object file")])
def test_a_library_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(library_module.importlib, "import_module", fail)
    reason = r"(is not installed \(tensorrt is missing\)|cannot be loaded \(libnvinfer.*\))"
    with pytest.raises(EngineError, match=rf"^TensorRT {reason}; run `pip install"):
        open_library.__wrapped__("tensorrt")


def test_the_driver_names_its_errors() -> None:
    driver = FakeDriver()
    device = Device(driver=driver)
    driver._cuStreamSynchronize = lambda stream: (driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="CUDA: cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.synchronize()

"""Launch lists and the plugin's enqueue path, against a driver that records what it is asked to launch."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import driver as real
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from trt_fake import FakeDriver

from sanawm.errors import EngineError
from sanawm_runtime.engines._trt_launch import Argument, Kernel, Launch, LaunchList, Operand, aligned_offsets, architecture
from sanawm_runtime.engines._trt_library import open_library
from sanawm_runtime.engines._trt_plugin import Launcher, make_plugin, take_failure


def cubin(capability: int, abi: int = 8, salt: bytes = b"") -> bytes:
    flags = capability << 8 | 2 if abi >= 8 else capability << 16 | 5 << 8 | capability
    return b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(9) + struct.pack("<H", 190) + bytes(28) + struct.pack("<I", flags) + bytes(12) + salt


def launch_list(**changes: Any) -> LaunchList:
    arguments = (
        Argument("input", 0, 1), Argument("input", 24, 0), Argument("output", 0, 0), Argument("workspace", 256), Argument("i32", -7),
        Argument("i64", 1 << 40), Argument("u32", 3_000_000_000), Argument("fp32", 0.5),
    )  # fmt: skip
    kernels = (Kernel("first", "f", 256, 1024, 64, cubin(120)), Kernel("second", "g", 128, 60_000, 128, cubin(120, salt=b"x")))
    fields = {
        "name": "gdn", "capability": "sm_120", "inputs": (Operand("bfloat16", (2, 12)), Operand("float32", (3,))),
        "outputs": (Operand("float32", (4,)),), "workspace": 512, "kernels": kernels,
        "launches": (Launch(0, (4, 2, 1), arguments), Launch(1, (1, 1, 1), arguments[:1]), Launch(0, (1, 1, 3), arguments)),
    }  # fmt: skip
    return LaunchList(**fields | changes)


@pytest.mark.parametrize(("number", "abi"), [(80, 7), (86, 7), (89, 7), (90, 7), (100, 8), (120, 8), (121, 8)])
def test_architecture_of_a_cubin(number: int, abi: int) -> None:
    assert architecture(cubin(number, abi)) == f"sm_{number}"


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(200), b"\x7fELF\x02\x01\x01" + bytes(100)])
def test_what_is_not_a_cubin(data: bytes) -> None:
    with pytest.raises(EngineError, match="expected a 64-bit CUDA ELF image"):
        architecture(data)


def test_a_list_survives_its_fields() -> None:
    launches = launch_list()
    assert LaunchList.from_fields(*launches.to_fields()) == launches


def test_kernels_for_another_architecture_are_refused() -> None:
    with pytest.raises(EngineError, match=r"kernel first is compiled for sm_120 and the engine for sm_121; compile it again"):
        launch_list(capability="sm_121")


@pytest.mark.parametrize(
    "argument",
    [
        Argument("input", 48, 0),
        Argument("input", -2, 0),
        Argument("input", 0, 2),
        Argument("output", 0, -1),
        Argument("workspace", 512),
        Argument("host", 0),  # type: ignore[arg-type]
    ],
)
def test_pointers_outside_of_their_tensors_are_refused(argument: Argument) -> None:
    with pytest.raises(EngineError, match="gdn: an argument"):
        launch_list(launches=(Launch(0, (1, 1, 1), (argument,)),))


@pytest.mark.parametrize("launch", [Launch(2, (1, 1, 1), ()), Launch(-1, (1, 1, 1), ()), Launch(0, (0, 1, 1), ()), Launch(0, (1, 1, 2**31), ())])
def test_launches_that_cannot_be(launch: Launch) -> None:
    with pytest.raises(EngineError, match="a launch names kernel"):
        launch_list(launches=(launch,))


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4))
def test_damaged_fields_are_one_sentence(place: int, junk: bytes) -> None:
    text, code = launch_list().to_fields()
    data = bytearray(text.encode())
    place %= len(data)
    data[place : place + len(junk)] = junk
    try:
        found = LaunchList.from_fields(data.decode("utf-8", "replace"), code)
    except EngineError as error:
        assert str(error)
    else:
        assert isinstance(found, LaunchList)  # the damage hit a name or a number that may be so
    with pytest.raises(EngineError, match="changed"):
        LaunchList.from_fields(text, code[:-1] + bytes([code[-1] ^ 1]))


def arguments_of(call: tuple[Any, ...], kinds: list[Any]) -> list[Any]:
    pointers = (ctypes.c_void_p * (len(kinds) + 2)).from_address(call[9])
    values = [kind.from_address(pointer).value for kind, pointer in zip(kinds, pointers, strict=False)]
    hidden = [ctypes.c_void_p.from_address(pointer).value for pointer in pointers[len(kinds) :]]
    assert hidden == [None, None]
    return values


def test_enqueue_passes_every_argument_in_its_width() -> None:
    driver = FakeDriver()
    launcher = Launcher(launch_list(), driver)
    seen: list[list[Any]] = []
    kinds = [ctypes.c_void_p] * 4 + [ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float]
    inner = driver._cuLaunchKernel

    def record(*call: Any) -> Any:
        seen.append(arguments_of(call, kinds if len(seen) % 3 != 1 else kinds[:1]))
        return inner(*call)

    driver._cuLaunchKernel = record  # type: ignore[method-assign]
    launcher.run([0x1000, 0x2000], [0x3000], 0x4000, 77)
    launcher.run([0x5000, 0x6000], [0x7000], 0x8000, 78)
    assert seen[0] == [0x2000, 0x1018, 0x3000, 0x4100, -7, 1 << 40, 3_000_000_000, 0.5]
    assert seen[1] == [0x2000]
    assert seen[3] == [0x6000, 0x5018, 0x7000, 0x8100, -7, 1 << 40, 3_000_000_000, 0.5]
    grids = [(call[1:4], call[4], call[7], int(call[8])) for call in driver.launches[:3]]
    assert grids == [((4, 2, 1), 256, 1024, 77), ((1, 1, 1), 128, 60_000, 77), ((1, 1, 3), 256, 1024, 77)]


def test_blocks_share_their_loaded_kernels() -> None:
    driver = FakeDriver()
    kernels = tuple(dataclasses.replace(k, cubin=k.cubin + b"shared") for k in launch_list().kernels)
    for _ in range(3):
        Launcher(launch_list(kernels=kernels), driver).run([1, 2], [3], 4, 0)
    assert driver.calls.count("cuModuleLoadData") == 2
    # Only the second kernel asks for more shared memory than every kernel may have.
    assert driver.calls.count("cuFuncSetAttribute") == 1


def test_a_kernel_that_does_not_load_is_named() -> None:
    driver = FakeDriver()
    driver._cuModuleLoadData = lambda image: (real.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, 0)  # type: ignore[method-assign]
    launches = launch_list(kernels=tuple(dataclasses.replace(k, cubin=k.cubin + b"new") for k in launch_list().kernels))
    with pytest.raises(EngineError, match=r"gdn: first for sm_120 cannot be loaded \(CUDA_ERROR_NO_BINARY_FOR_GPU\)"):
        Launcher(launches, driver).run([1, 2], [3], 4, 0)


def test_the_plugin_keeps_the_reason_of_a_failure() -> None:
    plugin = make_plugin(open_library("tensorrt_rtx"), launch_list())
    assert take_failure() is None
    with pytest.raises(EngineError, match="no NVIDIA driver was found"):
        plugin.enqueue([], [], [1, 2], [3], 4, 0)
    failure = take_failure()
    assert failure is not None and "no NVIDIA driver" in str(failure)


def test_offsets_are_aligned() -> None:
    assert aligned_offsets([1, 256, 257, 0, 5]) == ([0, 256, 512, 1024, 1024], 1280)

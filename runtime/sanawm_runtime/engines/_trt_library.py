"""TensorRT-RTX and TensorRT: one Python interface under two names."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sanawm.errors import EngineError

EngineName = Literal["tensorrt_rtx", "tensorrt"]

# The text inside an engine file, and the plugin interface, are not documented: a version is used only after its engines were looked at.
RTX_VERSION = "1.7.1.116"
# The first version with NVFP4 activations quantized on the fly.
FULL_VERSION = (11, 0)

_INSTALL = {
    "tensorrt_rtx": f"pip install tensorrt-rtx-cu13-libs=={RTX_VERSION} tensorrt-rtx-cu13-bindings=={RTX_VERSION} cuda-python",
    "tensorrt": "pip install 'sanawm[trt]'",
}
_MODULES = {"tensorrt_rtx": "tensorrt_rtx_bindings", "tensorrt": "tensorrt"}
_TITLES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
# What the ONNX parser opens by name when it meets a plugin node; without it the process aborts.
_UNVERSIONED = {"tensorrt_rtx": "libtensorrt_rtx.so", "tensorrt": "libnvinfer.so"}


@dataclass(frozen=True)
class Library:
    """An opened library: the bindings module and what to call it in messages."""

    engine: EngineName
    module: Any
    version: str

    @property
    def title(self) -> str:
        return f"{_TITLES[self.engine]} {self.version}"

    @property
    def ahead_of_time(self) -> bool:
        """True if it builds for GPUs that are not there."""
        return self.engine == "tensorrt_rtx"


@cache
def open_library(engine: EngineName) -> Library:
    """Import the bindings of an engine. Raises EngineError when they are missing, cannot be loaded, or have another version."""
    try:
        module = importlib.import_module(_MODULES[engine])
    except ModuleNotFoundError as error:
        raise EngineError(f"{_TITLES[engine]} is not installed ({error.name} is missing); run `{_INSTALL[engine]}`") from error
    except (ImportError, OSError) as error:
        raise EngineError(f"{_TITLES[engine]} cannot be loaded ({first_line(error)}); run `{_INSTALL[engine]}`") from error
    return check_version(engine, module)


def check_version(engine: EngineName, module: Any) -> Library:
    """The library behind an imported bindings module. Raises EngineError unless its version is one this code was written for."""
    version = str(module.__version__)
    if engine == "tensorrt_rtx" and version != RTX_VERSION:
        raise EngineError(f"expected TensorRT-RTX {RTX_VERSION}, found {version}; run `{_INSTALL[engine]}`")
    if engine == "tensorrt" and _numbers(version)[:2] < FULL_VERSION:
        needed = ".".join(map(str, FULL_VERSION))
        raise EngineError(f"expected TensorRT {needed} or newer, found {version}; run `{_INSTALL[engine]}`")
    return Library(engine, module, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def first_line(error: BaseException) -> str:
    """First line of an exception's message, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def require_parser_alias(library: Library) -> None:
    """Refuse to go on where the ONNX parser would abort the process at a plugin node. Raises EngineError."""
    name = _UNVERSIONED[library.engine]
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise EngineError(f"{library.title}: {name} cannot be opened by that name; start the process with its folder in LD_LIBRARY_PATH") from error


def library_file(library: Library) -> str:
    """Path of the loaded library that `require_parser_alias` looks for, from this process's memory map. Raises EngineError."""
    stem = _UNVERSIONED[library.engine]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if path.rpartition("/")[2].startswith(stem):
                return path
    raise EngineError(f"{library.title}: {stem} is not among the loaded libraries; reinstall it with `{_INSTALL[library.engine]}`")


class Messages:
    """What the library said since `take` was last called, worst last."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, str]] = []

    def add(self, severity: int, text: str) -> None:
        self._lines.append((severity, text))
        del self._lines[:-200]

    def take(self) -> list[str]:
        """Errors and warnings in the order they came, and forget them."""
        lines = [text for severity, text in self._lines if severity <= _WARNING]
        self._lines.clear()
        return lines

    def everything(self) -> str:
        """All lines since the last `take` as one, and forget them."""
        lines = [text.strip().splitlines()[0] for _, text in self._lines if text.strip()]
        self._lines.clear()
        return " ".join(lines)[:400]

    def error(self) -> str:
        """The first error since the last `take`, else the last line; empty when nothing was said."""
        errors = [text for severity, text in self._lines if severity <= _ERROR]
        said = errors[:1] or [text for _, text in self._lines[-1:]]
        self._lines.clear()
        return said[0].strip().splitlines()[0][:400] if said and said[0].strip() else ""


_ERROR, _WARNING, _INFO = 1, 2, 3


@cache
def _logger(module: Any) -> tuple[Any, Messages]:
    messages = Messages()

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= _INFO:
                messages.add(int(severity), text)

    return Logger(), messages


def logger(library: Library) -> tuple[Any, Messages]:
    """The process's logger and what went through it. The library keeps the first logger it is given, so there is one."""
    return _logger(library.module)


# Bits of the diagnosis of an engine, and what to do about each.
_CAUSES = (
    ("VERSION_MISMATCH", "it was built by another version of the library; install that version or rebuild the bundle"),
    ("UNSUPPORTED_CC", "it was built for another GPU; rebuild the bundle for this one"),
    ("OLD_CUDA_DRIVER", "the NVIDIA driver is too old; update it"),
    ("OLD_CUDA_RUNTIME", "the CUDA runtime is too old; update cuda-python and the driver"),
    ("INSUFFICIENT_GPU_MEMORY", "the GPU has too little free memory; close other programs"),
    ("MALFORMED_ENGINE", "it is not an engine of this library; rebuild the bundle"),
    ("CUDA_ERROR", "CUDA does not work here; check it with `nvidia-smi`"),
)


def refuse_invalid(library: Library, runtime: Any, data: bytes, what: str) -> None:
    """Ask the library whether it can load an engine here, before it tries. Raises EngineError with its diagnosis."""
    if not hasattr(runtime, "get_engine_validity"):
        return  # TensorRT finds out while loading
    trt, (_, messages) = library.module, logger(library)
    messages.take()
    validity, flags = runtime.get_engine_validity(data)
    if validity != trt.EngineValidity.INVALID:
        return
    said = messages.everything()
    members = list(trt.EngineInvalidityDiagnostics.__members__)
    causes = [advice for name, advice in _CAUSES if name in members and int(flags) & 1 << members.index(name)]
    detail = f" ({said})" if causes and said else ""
    raise EngineError(f"{library.title} cannot load {what}: {'; '.join(causes) or said or 'it gave no reason'}{detail}")


def checked(messages: Messages, what: str, action: Callable[[], Any]) -> Any:
    """Result of a library call that returns None or False, or raises, on failure. Raises EngineError with the library's own words."""
    try:
        result = action()
    except (RuntimeError, TypeError, ValueError) as error:
        said = messages.error()
        raise EngineError(f"{what}: {said or first_line(error)}") from error
    if result is None or result is False:
        raise EngineError(f"{what}: {messages.error() or 'the library gave no reason'}")
    return result

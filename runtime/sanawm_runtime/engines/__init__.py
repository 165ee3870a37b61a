"""Engines that run a bundle's programs, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable

from sanawm.errors import EngineError
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines.base import Buffer, Engine

__all__ = ["Buffer", "Engine", "open_engine"]


def _onnxruntime(bundle: Bundle, threads: int | None) -> Engine:
    from sanawm_runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, threads)


def _cuda(bundle: Bundle, threads: int | None) -> Engine:
    from sanawm_runtime.engines.cuda import CudaEngine

    return CudaEngine(bundle)


def _tensorrt(bundle: Bundle, threads: int | None) -> Engine:
    from sanawm_runtime.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(bundle)


_ENGINES: dict[str, Callable[[Bundle, int | None], Engine]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt_rtx": _tensorrt,
    "tensorrt": _tensorrt,
    "cuda": _cuda,
}


def open_engine(bundle: Bundle, threads: int | None = None) -> Engine:
    """The engine that a bundle was built for. Raises EngineError when this runtime has none or its library is missing."""
    name = bundle.manifest.target.engine
    if name not in _ENGINES:
        raise EngineError(f"the bundle needs the {name} engine, and this runtime has {', '.join(_ENGINES)}; upgrade sanawm or rebuild the bundle")
    return _ENGINES[name](bundle, threads)

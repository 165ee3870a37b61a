"""One program's engine: network from ONNX, configuration, serialization. Every step takes the opened library."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanawm.errors import EngineError
from sanawm.programs import TensorSpec
from sanawm_runtime.engines._trt_bindings import dtype_names
from sanawm_runtime.engines._trt_library import Library, checked, logger, require_parser_alias
from sanawm_runtime.engines._trt_plugin import register


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built, besides for which target.

    workspace: most scratch memory of one layer in bytes (None: the library's default). weight_streaming: let the runtime keep a part of the
    weights in host memory. tf32: let float32 products round their operands to ten bits; off, because camera geometry and recurrent state are
    float32 for their accuracy.
    """

    workspace: int | None = None
    weight_streaming: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class Network:
    """A parsed network and the builder that made it, which has to outlive it."""

    builder: Any
    definition: Any


def parse(library: Library, graph: bytes, folder: Path, *, plugins: bool = False) -> Network:
    """Network of an ONNX graph whose weights lie in `folder`. Raises EngineError with the parser's reason and the node it stopped at."""
    trt = library.module
    log, messages = logger(library)
    if plugins:
        register(library)
        require_parser_alias(library)
    builder = checked(messages, f"{library.title} cannot start", lambda: trt.Builder(log))
    definition = checked(messages, f"{library.title} cannot start a network", lambda: builder.create_network(0))
    parser = checked(messages, f"{library.title} cannot read ONNX", lambda: trt.OnnxParser(definition, log))
    # The parser looks for weight files beside the path it is told.
    if not parser.parse(graph, str(folder / "graph.onnx")):
        messages.take()
        raise EngineError(f"{library.title} refused the graph: {_parser_error(parser)}; build with --gdn matmul, or report this graph")
    return Network(builder, definition)


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    node = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
    return f"{error.desc().strip().splitlines()[0][:300]}{node}"


def check_signature(library: Library, network: Network, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Compare the network's inputs and outputs with a program's: names, dtypes, static shapes. Raises EngineError at the first difference."""
    names = dtype_names(library.module)
    definition = network.definition
    sides = (
        ("input", inputs, definition.num_inputs, definition.get_input),
        ("output", outputs, definition.num_outputs, definition.get_output),
    )
    for side, specs, count, get in sides:
        found = {t.name: (names.get(t.dtype, str(t.dtype)), tuple(t.shape)) for t in map(get, range(count))}
        for spec in specs:
            if found.get(spec.name) != (spec.dtype, spec.shape):
                other = found.get(spec.name, "none")
                raise EngineError(f"{side} {spec.name} should be {spec.dtype}{spec.shape}, the network has {other}; report this")
        if extra := sorted(set(found) - {spec.name for spec in specs}):
            raise EngineError(f"the network has {side}s that the program does not have: {', '.join(extra)}; report this")


def configure(library: Library, network: Network, capability: str, options: BuildOptions) -> Any:
    """Builder configuration for a target ("sm_120"). Raises EngineError for a target that the library cannot build for."""
    trt = library.module
    _, messages = logger(library)
    config = network.builder.create_builder_config()
    if library.ahead_of_time:
        wanted = getattr(trt.ComputeCapability, capability.replace("sm_", "SM"), None)
        if wanted is None:
            known = ", ".join(f"sm_{name[2:]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
            raise EngineError(f"{library.title} does not build for {capability}; it builds for {known}")
        config.num_compute_capabilities = 1
        checked(messages, f"{library.title} refused {capability}", lambda: config.set_compute_capability(wanted, 0))
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


def use_timing_cache(library: Library, config: Any, path: Path | None) -> None:
    """Start from kernel timings of earlier builds, where the library times kernels; an unsuitable file is replaced. TensorRT-RTX times none."""
    if path is None or library.ahead_of_time:
        return
    stored = path.read_bytes() if path.is_file() else b""
    for data in (stored, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def keep_timing_cache(library: Library, config: Any, path: Path | None) -> None:
    """Write the timings back; the file appears only when it is complete."""
    if path is None or library.ahead_of_time:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(memoryview(config.get_timing_cache().serialize()))
    os.replace(temporary, path)


def serialize(library: Library, network: Network, config: Any, write: Callable[[memoryview], object]) -> None:
    """Build the engine and pass its bytes to `write`, piece by piece. Raises EngineError with the library's reason."""
    trt = library.module
    _, messages = logger(library)

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            write(view)
            return len(view)

    writer = Writer()
    checked(
        messages, f"{library.title} cannot build it", lambda: network.builder.build_serialized_network_to_stream(network.definition, config, writer)
    )

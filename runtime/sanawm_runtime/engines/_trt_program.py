"""One deserialized engine, ready to run on bound addresses."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from sanawm.errors import EngineError
from sanawm_runtime.bundle import ProgramEntry
from sanawm_runtime.engines._trt_bindings import Binding, check_bindings, read_bindings
from sanawm_runtime.engines._trt_device import Device
from sanawm_runtime.engines._trt_library import Library, checked, logger
from sanawm_runtime.engines._trt_plugin import take_failure

_LOG = logging.getLogger("sanawm.tensorrt")
# CUDA graphs kept for a program: two sets of state buffers for each of the streams that take turns on it.
_GRAPHS = 64


class CompiledProgram:
    """A program's engine and context. Device memory for activations is the caller's, shared by programs that run in turn.

    `jit`: compiled code from an earlier run, or None. `graphs`: replay CUDA graphs; the first run on a set of addresses enqueues, the second
    records, later ones replay.
    """

    def __init__(self, name: str, library: Library, device: Device, engine: Any, entry: ProgramEntry, jit: bytes | None, graphs: bool = True) -> None:
        trt, (_, messages) = library.module, logger(library)
        self.name = name
        self._library, self._device, self._engine = library, device, engine
        self.table: tuple[Binding, ...] = read_bindings(trt, engine)
        check_bindings(name, self.table, entry.inputs, entry.outputs)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = self._runtime_cache(config, jit)
        self._context = checked(messages, f"{library.title} cannot prepare {name}", lambda: engine.create_execution_context(config))
        self._bound: tuple[int, ...] | None = None
        self._seen: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._record = graphs

    def _runtime_cache(self, config: Any, jit: bytes | None) -> Any:
        if not hasattr(config, "create_runtime_cache"):
            return None  # TensorRT compiles while building
        cache = config.create_runtime_cache()
        if jit is not None and not cache.deserialize(jit):
            _LOG.info("%s: %s does not take the code compiled earlier; it is compiled again", self.name, self._library.title)
        config.set_runtime_cache(cache)
        return cache

    @property
    def memory(self) -> int:
        """Bytes of device memory a run needs besides weights and bound tensors."""
        return int(self._engine.device_memory_size_v2)

    def compiled_code(self) -> bytes | None:
        """What the library compiled for this GPU so far, to be kept; None where it does not compile at run time."""
        return None if self._cache is None else bytes(self._cache.serialize())

    def use_memory(self, address: int, nbytes: int) -> None:
        """Give the program its memory; graphs recorded with another one are dropped."""
        self.drop_graphs()
        self._context.set_device_memory(address, nbytes)

    def run(self, addresses: Sequence[int]) -> None:
        """Enqueue on the device's stream; `addresses` in the table's order. Raises EngineError."""
        key = tuple(addresses)
        if not self._record:
            self._enqueue(key)
            return
        known = self._seen.get(key, _NEVER)
        if known is _NEVER:
            # The first run compiles and loads what was left open, which cannot be recorded.
            self._enqueue(key)
            self._remember(key, None)
        elif known is None:
            self._bind(key)
            if not self._context.is_stream_capturable(int(self._device.stream)):
                _LOG.warning("%s cannot be recorded as a CUDA graph; it is enqueued kernel by kernel", self.name)
                self._record = False
                self._enqueue(key)
                return
            with self._device.capture() as made:
                self._enqueue(key)
            self._remember(key, made[0])
            self._device.replay(made[0])
        else:
            self._seen.move_to_end(key)
            self._device.replay(known)

    def _remember(self, key: tuple[int, ...], graph: Any) -> None:
        self._seen[key] = graph
        self._seen.move_to_end(key)
        while len(self._seen) > _GRAPHS:
            _, old = self._seen.popitem(last=False)
            if old is not None:
                self._device.drop(old)

    def _bind(self, key: tuple[int, ...]) -> None:
        if key == self._bound:
            return
        for binding, address in zip(self.table, key, strict=True):
            if not self._context.set_tensor_address(binding.name, address):
                raise EngineError(f"{self._library.title} refused the buffer of '{binding.name}' in {self.name}: {logger(self._library)[1].error()}")
        self._bound = key

    def _enqueue(self, key: tuple[int, ...]) -> None:
        self._bind(key)
        _, messages = logger(self._library)
        if self._context.execute_async_v3(int(self._device.stream)):
            return
        if (failure := take_failure()) is not None:
            raise EngineError(f"{self.name}: {failure}") from failure
        raise EngineError(f"{self._library.title} failed in {self.name}: {messages.error() or 'it gave no reason'}")

    def drop_graphs(self) -> None:
        """Forget the recorded graphs."""
        for graph in self._seen.values():
            if graph is not None:
                self._device.drop(graph)
        self._seen.clear()

    def close(self) -> None:
        self.drop_graphs()
        self._context = self._engine = self._cache = None


_NEVER = object()

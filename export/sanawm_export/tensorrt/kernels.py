"""Our kernels compiled for an engine's target."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sanawm.errors import EngineError
from sanawm_kernels.aot import compile as compiler
from sanawm_kernels.aot.build import cache_directory
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime.engines._trt_launch import Kernel
from sanawm_runtime.engines._trt_library import first_line


@dataclass(frozen=True)
class Compiled:
    """A compiled variant: its code, and its arguments in the code's order."""

    variant: KernelVariant
    kernel: Kernel
    arguments: tuple[str, ...]


def target_number(capability: str) -> int:
    """120 for "sm_120"."""
    return int(capability.removeprefix("sm_"))


class KernelCompiler:
    """Compiles kernel variants for one target, each once, in processes of their own. Use as a context manager or call `close`.

    `cache` keeps compiled kernels between builds (default: the kernels' own cache directory).
    """

    def __init__(self, capability: str, jobs: int | None = None, cache: Path | None = None) -> None:
        self._target = target_number(capability)
        self._jobs = jobs or os.cpu_count() or 1
        self._cache = str(cache or cache_directory())
        self._done: dict[str, Compiled] = {}
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def compile(self, variants: Sequence[KernelVariant]) -> tuple[Compiled, ...]:
        """The compiled variants in order. Raises EngineError for one that does not compile for the target."""
        # Names leave out sizes, so the whole variant is the key.
        keys = [repr(variant) for variant in variants]
        missing = {key: v for key, v in zip(keys, variants, strict=True) if key not in self._done}
        if missing:
            waiting = {key: self._workers().submit(compiler.in_worker, v, self._target, None, self._cache) for key, v in missing.items()}
            for key, future in waiting.items():
                variant = missing[key]
                try:
                    cubin, entry, _ = future.result()
                except compiler.CompileError as error:
                    reason = first_line(error)
                    raise EngineError(f"{variant.name} does not compile for sm_{self._target} ({reason}); build with --gdn matmul") from error
                kernel = Kernel(variant.name, entry["entry"], entry["num_warps"] * 32, entry["shared_bytes"], entry["registers"], cubin)
                self._done[key] = Compiled(variant, kernel, tuple(argument["name"] for argument in entry["arguments"]))
        return tuple(self._done[key] for key in keys)

    def _workers(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            # Spawned: a process that interprets kernels cannot compile them.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self._jobs, context, initializer=compiler.start_worker)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

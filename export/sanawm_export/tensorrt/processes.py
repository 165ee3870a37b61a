"""Engine builds in processes of their own, as many at a time as fit into memory."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sanawm.errors import UserError
from sanawm_export.tensorrt.job import Built, Job
from sanawm_runtime.engines._trt_library import Library, library_file

T = TypeVar("T")

_UNVERSIONED = {"tensorrt_rtx": "libtensorrt_rtx.so", "tensorrt": "libnvinfer.so"}


class BuildProcesses:
    """Runs jobs; use as a context manager. Leaving it by an exception ends the processes that still run.

    `memory`: bytes that builds may use together (default: what is free now, less a reserve). A job larger than that runs alone.
    `processes`: most at a time (default: the machine's cores).
    """

    def __init__(self, library: Library, scratch: Path, memory: int | None = None, processes: int | None = None) -> None:
        self._memory = memory if memory is not None else max(available_memory() - 2**30, 2**30)
        self._count = processes or os.cpu_count() or 1
        self._used = 0
        self._turn = threading.Condition()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._environment = _environment(library, scratch)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._count, thread_name_prefix="engine-build")

    def submit(self, job: Job, then: Callable[[Built], T]) -> concurrent.futures.Future[T]:
        """Start a build as soon as there is room, and hand its result to `then` in the same thread.

        The future holds what `then` returned, and raises UserError when the build fails.
        """
        return self._pool.submit(lambda: then(self._run(job)))

    def _run(self, job: Job) -> Built:
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or not self._used or self._used + job.memory <= self._memory)
            self._used += job.memory
        try:
            return self._build(job)
        finally:
            with self._turn:
                self._used -= job.memory
                self._turn.notify_all()

    def _build(self, job: Job) -> Built:
        record = job.out.with_suffix(".job.json")
        record.write_text(job.to_json())
        with tempfile.TemporaryFile("w+") as log:
            with self._turn:
                if self._stopped:
                    raise UserError(f"the build of {job.program.name} was stopped; start it again")
                command = [sys.executable, "-m", "sanawm_export.tensorrt.worker", str(record)]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment)
                self._running.add(process)
            try:
                output, _ = process.communicate()
            finally:
                with self._turn:
                    self._running.discard(process)
            log.seek(0)
            said = log.read().strip().splitlines()
        return _result(job, process.returncode, output.strip().splitlines(), said)

    def __enter__(self) -> BuildProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self.stop()
        self._pool.shutdown(cancel_futures=kind is not None)

    def stop(self) -> None:
        """End the builds that run and refuse those that wait."""
        with self._turn:
            self._stopped = True
            for process in self._running:
                process.kill()
            self._turn.notify_all()


def _result(job: Job, status: int, output: list[str], said: list[str]) -> Built:
    if status == 0 and output:
        return Built.from_json(output[-1])
    name = job.program.name
    if status == 2 and output:
        raise UserError(f"{name}: {json.loads(output[-1])['error'].removeprefix(f'{name}: ')}")
    if status < 0:
        hint = "it ran out of memory: close other programs or build on a larger machine" if status == -9 else "report this"
        raise UserError(f"{name}: the process that built it was ended by signal {-status}; {hint}")
    raise UserError(f"{name}: the process that built it failed ({said[-1] if said else f'exit status {status}'}); report this")


def _environment(library: Library, scratch: Path) -> dict[str, str]:
    """The environment of a build process: one where the library can be opened by its plain name."""
    alias = scratch / "alias"
    alias.mkdir(exist_ok=True)
    link = alias / _UNVERSIONED[library.engine]
    if not link.is_symlink():
        link.symlink_to(library_file(library))
    path = os.pathsep.join(filter(None, [str(alias), os.environ.get("LD_LIBRARY_PATH", "")]))
    return {**os.environ, "LD_LIBRARY_PATH": path, "SANAWM_BUILD_PARENT": str(os.getpid())}


def available_memory() -> int:
    """Bytes that can be used without swapping, within this process's control group."""
    with open("/proc/meminfo", encoding="ascii") as file:
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    free = values.get("MemAvailable", values["MemFree"])
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))

"""Builds in processes of their own: what they return, how they fail, how many run at once, and how they are stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sanawm.config import tiny_config
from sanawm.errors import UserError
from sanawm.programs import Geometry, TensorSpec
from sanawm_export.tensorrt import network, processes
from sanawm_export.tensorrt.euler import euler_programs, write_euler
from sanawm_export.tensorrt.job import Built, Job
from sanawm_export.tensorrt.processes import BuildProcesses, available_memory
from sanawm_runtime.engines._trt_library import open_library


@pytest.fixture
def job(tmp_path: Path) -> Job:
    program = euler_programs(Geometry(tiny_config(), 16, dtype="bfloat16"))["euler_first"]
    write_euler(program, tmp_path / "euler.onnx")
    return Job("tensorrt_rtx", "sm_120", program, tmp_path / "euler.onnx", tmp_path, tmp_path / "euler.engine")


def run(folder: Path, *jobs: Job, memory: int | None = None) -> list[Built]:
    with BuildProcesses(open_library("tensorrt_rtx"), folder, memory) as builds:
        return [future.result() for future in [builds.submit(job, lambda built: built) for job in jobs]]


def test_a_job_becomes_an_engine(job: Job, tmp_path: Path) -> None:
    assert Job.from_json(job.to_json()) == job
    (built,) = run(tmp_path, job)
    assert built.audited and built.size == job.out.stat().st_size and built.functions > 0
    assert built.seconds > 0 and built.peak_rss > 10 * 2**20 and "1.7.1" in built.library
    assert Built.from_json(built.to_json()) == built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": "sm_90"}, r"^euler_first: TensorRT-RTX .* does not build for sm_90"),
        ({"graph": "junk"}, r"^euler_first: TensorRT-RTX .* refused the graph: "),
        ({"asked": {"qkv": "nvfp4"}}, r"^euler_first: the engine does not compute what the recipe asks: qkv asked nvfp4, got constant"),
        ({"program": "other"}, r"^euler_first: input latents should be bfloat16\(1, 2\), the network has \('bfloat16', \(1, "),
    ],
    ids=["target", "graph", "precision", "signature"],
)
def test_failures_are_one_sentence(job: Job, tmp_path: Path, change: dict[str, object], message: str) -> None:
    if change.get("graph"):
        (tmp_path / "junk").write_bytes(b"not a graph")
        change = {"graph": tmp_path / "junk"}
    if change.get("program"):
        inputs = (TensorSpec("latents", "bfloat16", (1, 2)), *job.program.inputs[1:])
        change = {"program": dataclasses.replace(job.program, inputs=inputs)}
    with pytest.raises(UserError, match=message):
        run(tmp_path, dataclasses.replace(job, **change))  # type: ignore[arg-type]


def sleeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float) -> None:
    """Replace the build process by one that notes when it runs."""
    script = tmp_path / "sleep.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"open({str(tmp_path)!r} + '/log', 'a').write(f'start {{time.time()}}\\n')\n"
        f"time.sleep({seconds})\n"
        f"open({str(tmp_path)!r} + '/log', 'a').write(f'end {{time.time()}}\\n')\n"
        "print(json.dumps(dict(seconds=1, peak_rss=1, size=1, sha256='', library='', audited=True, rows=[], cubins=[], warnings=[])))\n"
    )

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__([command[0], str(script)], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(processes.subprocess, "Popen", Popen)


def test_builds_wait_until_there_is_memory(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping(monkeypatch, tmp_path, 0.3)
    jobs = [dataclasses.replace(job, out=tmp_path / f"{i}.engine", weight_bytes=2**30) for i in range(2)]
    run(tmp_path, *jobs, memory=jobs[0].memory + 1)
    events = [line.split()[0] for line in sorted((tmp_path / "log").read_text().splitlines(), key=lambda line: float(line.split()[1]))]
    assert events == ["start", "end", "start", "end"]


def test_an_error_stops_the_others(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping(monkeypatch, tmp_path, 60)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), BuildProcesses(open_library("tensorrt_rtx"), tmp_path) as builds:
        future = builds.submit(job, lambda built: built)
        while not (tmp_path / "log").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 30
    with pytest.raises(UserError, match="ended by signal 9"):
        future.result()


def test_a_build_process_ends_with_the_build(job: Job, tmp_path: Path) -> None:
    record = tmp_path / "job.json"
    record.write_text(job.to_json())
    # A parent that is killed while its worker still waits for the graph, which here is a pipe that nobody writes to.
    os.unlink(job.graph)
    os.mkfifo(job.graph)
    code = (
        "import os, subprocess, sys, time\n"
        "environment = {**os.environ, 'SANAWM_BUILD_PARENT': str(os.getpid())}\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'sanawm_export.tensorrt.worker', {str(record)!r}], env=environment)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    held: list[int] = []
    _wait_for(lambda: _opened_by_a_reader(job.graph, held))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait_for(lambda: _state(child) in ("gone", "Z"))
    os.close(held[0])


def _wait_for(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def _opened_by_a_reader(pipe: Path, held: list[int]) -> bool:
    """Hold the pipe's other end as soon as there is a reader, who then waits for content."""
    try:
        held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_free_memory_is_known() -> None:
    assert 2**26 < available_memory() < 2**45


def test_kernel_timings_are_kept_where_the_library_times_kernels(job: Job, tmp_path: Path) -> None:
    """TensorRT-RTX has the calls and times nothing, so it can stand in for TensorRT."""
    rtx = open_library("tensorrt_rtx")
    for library, kept in ((dataclasses.replace(rtx, engine="tensorrt"), True), (rtx, False)):
        path = tmp_path / library.engine / "timings"
        for _ in range(2):  # the second time it starts from what the first one left
            parsed = network.parse(rtx, job.graph.read_bytes(), tmp_path)
            config = network.configure(rtx, parsed, "sm_120", network.BuildOptions(workspace=2**28, weight_streaming=True))
            network.use_timing_cache(library, config, path)
            network.serialize(rtx, parsed, config, lambda data: None)
            network.keep_timing_cache(library, config, path)
        assert path.is_file() == kept

"""Timing of kernels on one GPU, and the JSON files that hold the results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 512 << 20
# A graph's launch of 2 to 4 us is spread over so many calls.
LEAST_SETS, MOST_SETS = 10, 40


@dataclass(frozen=True)
class Work:
    """One launch of several: its minimal traffic in bytes, and its arithmetic in a unit ("bf16", "fp8")."""

    bytes: int
    flops: int = 0
    kind: str = "bf16"


@dataclass(frozen=True)
class Case:
    """One row to be: how to make the calls, and the work they must do.

    prepare() returns the call under test and its peers by name; inputs are fresh random numbers each time it is called. bytes: memory traffic that
    no implementation avoids; flops: arithmetic, of `kind` ("bf16", "fp8"); includes: what the time covers. A case of several launches lists the
    `work` of each instead; launches run one after the other, so their floors add up.
    """

    name: str
    prepare: Callable[[], tuple[Callable[[], Any], dict[str, Callable[[], Any]]]]
    bytes: int = 0
    flops: int = 0
    kind: str = "bf16"
    includes: str = "one launch"
    needs: int = 80
    extra: dict[str, Any] = field(default_factory=dict)
    work: tuple[Work, ...] = ()

    @property
    def parts(self) -> tuple[Work, ...]:
        """The work of each launch."""
        return self.work or (Work(self.bytes, self.flops, self.kind),)

    def floor(self, bandwidth: float, peaks: Mapping[str, float]) -> float:
        """Microseconds at a bandwidth in bytes/s and the peaks of the units in FLOP/s."""
        return sum(max(w.bytes / bandwidth, w.flops / peaks[w.kind] if w.flops else 0.0) for w in self.parts) * 1e6


@dataclass(frozen=True)
class Timing:
    """Microseconds over n runs."""

    median: float
    least: float
    most: float
    n: int


def measure(calls: Callable[[], Any] | Sequence[Callable[[], Any]], n: int = 60) -> Timing:
    """Time of one call: all calls are recorded in one CUDA graph, which is replayed n times (n >= 50) and its time divided among them.

    A launch of a graph costs some microseconds: a short call is timed as several, each on inputs of its own. The second-level cache is overwritten
    before every replay.
    """
    each = [calls] if callable(calls) else list(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in each:
            for _ in range(3 if len(each) == 1 else 1):
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Results stay alive until the end of the recording: calls that wrote to the same memory would find it in the cache.
    with torch.cuda.graph(graph):
        kept = [call() for call in each]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(n + 10):
        flush.random_(0, 255)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(each))
    del kept
    times = times[10:]
    return Timing(statistics.median(times), min(times), max(times), n)


def sustained(call: Callable[[], Any], seconds: float = 0.25) -> float:
    """Microseconds of a call at full power: the best of three times `seconds` without a pause, after as long that is not counted.

    A GPU that reaches its power limit takes longer then than for a single call, and not in the same proportion for every kernel.
    """
    calls, graph = 20, torch.cuda.CUDAGraph()
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(calls)]
    times = []
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        replays, started = 0, time.perf_counter()
        begin.record()
        while time.perf_counter() - started < seconds:
            graph.replay()
            torch.cuda.current_stream().synchronize()
            replays += 1
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (replays * calls))
    del kept
    return min(times[1:])


def repeats(nbytes: int, floor: float, cache: int) -> int:
    """Input sets that a short call is timed with: enough that together they do not fit a cache of `cache` bytes twice.

    One for a call of 100 microseconds or more, which the launch of a graph hardly delays.
    """
    return 1 if floor >= 100 else min(MOST_SETS, max(LEAST_SETS, -(-2 * cache // max(nbytes, 1))))


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy by a kernel, read and write counted. (A graph's own copy node takes half as long again on an H200.)"""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: torch.neg(source, out=target)).median * 1e-6)


def peak_flops(kind: str) -> float:
    """FLOP/s of a large square product through cuBLASLt, the practical peak that floors are computed from."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    if kind == "bf16":
        time = measure(lambda: a @ b.t())
    else:
        one = torch.ones((), device="cuda")
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        time = measure(lambda: torch._scaled_mm(x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return float(2 * size**3 / (time.median * 1e-6))


def run(cases: Sequence[Case], notes: str) -> dict[str, Any]:
    """Time all cases that this GPU can run; the object that a results file holds."""
    major, minor = torch.cuda.get_device_capability()
    bandwidth = copy_bandwidth()
    peaks: dict[str, float] = {}
    rows = []
    for case in cases:
        if major * 10 + minor < case.needs:
            continue
        for kind in sorted({w.kind for w in case.parts if w.flops} - set(peaks)):
            peaks[kind] = peak_flops(kind)
        floor = case.floor(bandwidth, peaks)
        count = repeats(sum(w.bytes for w in case.parts), floor, torch.cuda.get_device_properties(0).L2_cache_size)
        prepared = [case.prepare() for _ in range(count)]
        time = measure([call for call, _ in prepared])
        timed = {name: measure([peers[name] for _, peers in prepared]) for name in prepared[0][1]}
        best = min(timed, key=lambda name: timed[name].median) if timed else None
        rows.append(
            {
                "case": case.name, "metric": "time", "value": time.median, "unit": "us", "min": time.least, "max": time.most, "n": time.n,
                "floor": floor, "peer": best, "peer_value": timed[best].median if best else None, "includes": case.includes, "sets": count,
                "peers": {name: t.median for name, t in timed.items()}, **case.extra,
            }
        )  # fmt: skip
        print(
            f"{case.name:48s} {time.median:9.1f} us  floor {floor:8.1f}  " + "  ".join(f"{k} {t.median:.1f}" for k, t in timed.items()),
            flush=True,
        )
        del prepared
        torch.cuda.empty_cache()
    return {**environment(), "notes": notes, "copy_bytes_per_s": bandwidth, "peak_flops": peaks, "rows": rows}


def environment() -> dict[str, Any]:
    """Hardware, driver, versions, commit and date."""
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "hardware": torch.cuda.get_device_name(),
        "driver": driver.stdout.split()[0],
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a results file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(temporary, path)


def main(
    subject: str,
    cases: Callable[[], Sequence[Case]],
    notes: str,
    propose: Callable[[], None] | None = None,
    finish: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> None:
    """Command line of a benchmark script; `finish` may add to the rows."""
    parser = argparse.ArgumentParser(description=notes)
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/<hardware>-<subject>.json)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and their minimal work; needs no GPU")
    if propose is not None:
        parser.add_argument("--propose", action="store_true", help="time candidate tiles and print rows for the tuning table")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    if options.dry_run:
        for case in chosen:
            nbytes, flops, units = sum(w.bytes for w in case.parts), sum(w.flops for w in case.parts), "+".join(sorted({w.kind for w in case.parts}))
            print(f"{case.name:48s} {nbytes / 1e6:9.2f} MB  {flops / 1e9:9.2f} GFLOP {units:8s} sm_{case.needs}+  {case.includes}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run this on the GPU to be measured, or list the cases with --dry-run")
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    if propose is not None and options.propose:
        propose()
        return
    result = run(chosen, notes)
    finish(result["rows"])
    hardware = result["hardware"].lower().replace("nvidia ", "").replace(" ", "-")
    path = options.out or ROOT / "benchmarks" / "results" / f"{hardware}-{subject}.json"
    write(path, result)
    print(path)

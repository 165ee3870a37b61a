"""Long runs of sessions on the CPU engine: memory, latency, threads and descriptors over time.

    python benchmarks/soak.py world SMALL        # a random world of 64 x 128 pixels, for more chunks in the same time
    python benchmarks/soak.py chunks BUNDLE --count 10000
    python benchmarks/soak.py sessions BUNDLE --count 1000
    python benchmarks/soak.py clients BUNDLE --clients 20 --count 20

Each prints a table and, with -o, writes rows in the format of `benchmarks/results`. Linux only: it reads /proc.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import sanawm


@dataclass
class Sample:
    """A process at one moment."""

    done: int
    rss_mb: float
    threads: int
    descriptors: int
    latency_s: float
    cpu_s: float


@dataclass
class Watch:
    """Samples of a process, one after every so many units of work; `latencies` collects those since the last."""

    pid: int = field(default_factory=os.getpid)
    samples: list[Sample] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    every: list[float] = field(default_factory=list)
    _cpu_s: float = 0.0

    def take(self, done: int) -> Sample:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        latency = float(np.median(self.latencies)) if self.latencies else float("nan")
        # User and system time, fields 14 and 15 of proc_pid_stat(5), counted behind the command's closing bracket.
        ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        cpu_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        spent, self._cpu_s = (cpu_s - self._cpu_s) / max(1, len(self.latencies)), cpu_s
        sample = Sample(done, int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), descriptors, latency, spent)
        self.samples.append(sample)
        self.every += self.latencies
        self.latencies.clear()
        return sample

    def growth_mb(self) -> float:
        """Memory gained between the first quarter of the run and its end, by a line through the samples."""
        kept = self.samples[len(self.samples) // 4 :]
        done, rss = np.array([s.done for s in kept], float), np.array([s.rss_mb for s in kept])
        return float(np.polyfit(done, rss, 1)[0] * (done[-1] - done[0])) if len(kept) > 1 else 0.0

    def rows(self, case: str, unit_of_work: str) -> list[dict[str, Any]]:
        """Result rows: what was so at the beginning and at the end."""
        first, last = self.samples[max(1, len(self.samples) // 10)], self.samples[-1]
        late = [s for s in self.samples[1:] if s.latency_s == s.latency_s]
        tenth = max(1, len(late) // 10)
        n = last.done
        return [
            row(f"{case}.{unit_of_work}", "rss growth after the first quarter", self.growth_mb(), "MB", n=n),
            row(f"{case}.{unit_of_work}", "rss", last.rss_mb, "MB", n=n, low=first.rss_mb, high=max(s.rss_mb for s in self.samples)),
            row(f"{case}.{unit_of_work}", "threads", last.threads, "1", n=n, low=first.threads, high=max(s.threads for s in self.samples)),
            row(f"{case}.{unit_of_work}", "descriptors", last.descriptors, "1", n=n, low=first.descriptors, high=max(s.descriptors for s in self.samples)),
            row(f"{case}.{unit_of_work}", "median latency, first tenth", float(np.median([s.latency_s for s in late[:tenth]])), "s", n=n),
            row(f"{case}.{unit_of_work}", "median latency, last tenth", float(np.median([s.latency_s for s in late[-tenth:]])), "s", n=n),
            # On a machine that others use too this says more than the latency does.
            row(f"{case}.{unit_of_work}", "processor time of one, first tenth", float(np.median([s.cpu_s for s in late[:tenth]])), "s", n=n),
            row(f"{case}.{unit_of_work}", "processor time of one, last tenth", float(np.median([s.cpu_s for s in late[-tenth:]])), "s", n=n),
            row(f"{case}.{unit_of_work}", "p99 latency", float(np.percentile(self.every, 99)), "s", n=n),
        ]


def row(case: str, metric: str, value: float, unit: str, *, n: int, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    keys = {"floor": None, "peer": None, "peer_value": None, "includes": None}
    return {"case": case, "metric": metric, "value": round(value, 4), "unit": unit, "min": low, "max": high, "n": n, **keys}


def soak_chunks(bundle: Path, count: int, threads: int | None, every: int = 100) -> Watch:
    """One stream that goes on and on, across the ends of its time axis."""
    from sanawm_runtime import World

    watch = Watch()
    with World.open(bundle, threads=threads) as world:
        height, width = world.image_size
        with world.start(np.full((height, width, 3), 120, np.uint8), "a plain", at_end="continue") as stream:
            # Ctrl-C ends a run that takes too long; what was measured until then counts.
            with suppress(KeyboardInterrupt):
                for done, chunk in enumerate(stream.play("wd", count), start=1):
                    watch.latencies.append(chunk.waited_s + sum(chunk.seconds.values()))
                    if done % every == 0:
                        show(watch.take(done))
    return watch


@contextmanager
def server(bundle: Path, threads: int | None, *options: str) -> Iterator[tuple[str, int]]:
    """`sanawm serve` as a process of its own: its address and its id."""
    command = [sys.executable, "-m", "sanawm.cli", "serve", str(bundle), "--port", "0", "--json", "--log-level", "warning", *options]
    command += [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.wait(60)


def soak_sessions(bundle: Path, count: int, threads: int | None, every: int = 20) -> Watch:
    """Sessions that come and go: connect, upload, start, one chunk, leave; every tenth without a goodbye."""
    from sanawm_runtime.serve.client import Client

    image = _picture()
    with server(bundle, threads, "--linger", "0.2", "--sessions", "8") as (url, pid):
        watch = Watch(pid)
        for done in range(1, count + 1):
            begin = time.perf_counter()
            client = Client(url)
            client.start(f"a plain {done % 40}", image, seed=done)
            client.chunk()
            if done % 10 == 0:
                client.socket.socket.shutdown(2)
            client.close()
            watch.latencies.append(time.perf_counter() - begin)
            if done % every == 0:
                show(watch.take(done))
        time.sleep(2)
        show(watch.take(count + 1))
    return watch


@dataclass
class Load:
    """What each of many clients got."""

    turnaround: list[list[float]]
    first_frame: list[list[float]]
    computed: list[float]
    frames_by_then: list[int]
    refused: tuple[int, str]
    seconds: float


def load(bundle: Path, clients: int, count: int, threads: int | None) -> Load:
    """Clients at once, each asking for the next chunk when it has one; and one client too many."""
    from websockets.exceptions import ConnectionClosed

    from sanawm_runtime.serve.client import Client

    image = _picture()
    turnaround: list[list[float]] = [[] for _ in range(clients)]
    first_frame: list[list[float]] = [[] for _ in range(clients)]
    computed: list[float] = []
    frames = [0] * clients
    frames_by_then: list[int] = []
    everyone = threading.Barrier(clients + 1)

    def run(number: int) -> None:
        with Client(url, timeout_s=300) as client:
            client.start(f"a plain {number}", image, seed=number)
            everyone.wait()
            for _ in range(count):
                begin = time.perf_counter()
                client.send("more", chunks=1)
                facts = client.wait_for("chunk")
                first_frame[number].append(time.perf_counter() - begin)
                for _ in range(facts["frames"]):
                    client.socket.recv(300)
                    frames[number] += 1
                turnaround[number].append(time.perf_counter() - begin)
                computed.append(sum(facts["seconds"].values()))
            # What everyone has when the first one has everything says whether somebody starved.
            if not frames_by_then:
                frames_by_then.extend(frames)

    with server(bundle, threads, "--sessions", str(clients)) as (url, _):
        workers = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
        for worker in workers:
            worker.start()
        everyone.wait()
        begin = time.perf_counter()
        refused = (0, "")
        try:
            with Client(url) as extra:
                extra.start("one too many", image)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            refused = (closed.rcvd.code, closed.rcvd.reason)
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
    return Load(turnaround, first_frame, computed, frames_by_then, refused, seconds)


def _picture() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((320, 192)).save(out, "PNG")
    return out.getvalue()


def show(sample: Sample) -> None:
    click.echo(
        f"{sample.done:6}  {sample.rss_mb:8.1f} MB  {sample.threads:3} threads  {sample.descriptors:4} descriptors"
        f"  {sample.latency_s:.4f} s  {sample.cpu_s:.4f} s of processor time",
        err=True,
    )


def save(out: Path | None, rows: list[dict[str, Any]], notes: str) -> None:
    for entry in rows:
        extra = "" if entry["max"] is None else f"  ({entry['min']:g} to {entry['max']:g})"
        click.echo(f"{entry['case']:32} {entry['metric']:36} {entry['value']:10.4g} {entry['unit']}{extra}")
    if out is None:
        return
    kept = json.loads(out.read_text())["rows"] if out.exists() else []
    cases = {entry["case"] for entry in rows}
    import onnxruntime

    document = {
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "driver": None,
        "versions": {"sanawm": sanawm.__version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "notes": notes,
        "rows": sorted([entry for entry in kept if entry["case"] not in cases] + rows, key=lambda entry: entry["case"]),
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


@click.group()
def main() -> None:
    """Soak tests of the runtime and the server."""


_common = (
    click.argument("bundle", type=click.Path(path_type=Path)),
    click.option("--threads", type=int, help="CPU threads of the engine."),
    click.option("--notes", default="", help="What else the machine was doing."),
    click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Results file to add to."),
)


def common(command: Any) -> Any:
    for option in reversed(_common):
        command = option(command)
    return command


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
def world(out: Path) -> None:
    """Build the bundle of a random world a seventh as large as the tiny one."""
    import tempfile
    from dataclasses import replace

    from sanawm.config import preset
    from sanawm.model.checkpoint import open_checkpoint
    from sanawm.model.checkpoint.synth import synthesize
    from sanawm_export.build import BuildRequest, build_onnxruntime
    from sanawm_runtime.targets import resolve_target

    tiny = preset("tiny")
    small = replace(tiny, name="small", dit=replace(tiny.dit, hidden=64, cross_heads=2, height=2, width=4))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(synthesize(Path(folder, "small"), small))
        build_onnxruntime(BuildRequest(checkpoint, resolve_target("cpu"), "onnxruntime", "fp32"), out)


@main.command()
@common
@click.option("--count", default=10_000, show_default=True)
def chunks(bundle: Path, threads: int | None, notes: str, out: Path | None, count: int) -> None:
    """One stream of COUNT chunks."""
    save(out, soak_chunks(bundle, count, threads).rows("soak", "chunks"), notes)


@main.command()
@common
@click.option("--count", default=1000, show_default=True)
def sessions(bundle: Path, threads: int | None, notes: str, out: Path | None, count: int) -> None:
    """COUNT sessions of a server, one after the other."""
    save(out, soak_sessions(bundle, count, threads).rows("soak", "sessions"), notes)


@main.command()
@common
@click.option("--clients", "clients_", default=20, show_default=True)
@click.option("--count", default=20, show_default=True, help="Chunks for each.")
def clients(bundle: Path, threads: int | None, notes: str, out: Path | None, clients_: int, count: int) -> None:
    """Clients at once on one engine."""
    found = load(bundle, clients_, count, threads)
    everything, firsts = np.concatenate(found.turnaround), np.concatenate(found.first_frame)
    finished = [sum(times) for times in found.turnaround]
    had = found.frames_by_then
    case, n = f"serve.{clients_}clients", len(everything)
    save(
        out,
        [
            row(case, "frame latency, median", float(np.median(firsts)), "s", n=n, low=float(firsts.min()), high=float(firsts.max())),
            row(case, "frame latency, p99", float(np.percentile(firsts, 99)), "s", n=n),
            row(case, "chunk turnaround, median", float(np.median(everything)), "s", n=n),
            row(case, "chunk turnaround, p99", float(np.percentile(everything, 99)), "s", n=n),
            row(case, "a chunk's own time, median", float(np.median(found.computed)), "s", n=n),
            row(case, "frames a client had when the first had all", float(np.median(had)), "1", n=clients_, low=min(had), high=max(had)),
            row(case, "time of the slowest client over the fastest", max(finished) / min(finished), "1", n=clients_),
            row(case, "chunks a second, all clients", n / found.seconds, "1/s", n=n),
            row(case, "close code of one client more", found.refused[0], "1", n=1),
        ],
        notes,
    )


if __name__ == "__main__":
    main()

"""A stream of many chunks: whether its time, its memory and its allocations stay what they are."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Any

from sanawm.schedule import chunk_grid
from sanawm_export.cuda.bench import Bench
from sanawm_export.cuda.bench_rows import row

# Chunks after which memory is compared, and those at either end whose times are.
SETTLED, ENDS = 5, 40
# Each of so many chunks is decoded, and its frames copied to the host.
DECODED = 10


@dataclass(frozen=True)
class State:
    """What the device holds and what was allocated so far, after so many chunks."""

    chunks: int
    used_bytes: int
    allocations: int


@dataclass(frozen=True)
class Endurance:
    """`period`: seconds from the end of a chunk to the end of the next; `states` after SETTLED chunks, and whenever one was decoded."""

    period: list[float]
    states: list[State]


def run(bench: Bench, chunks: int) -> Endurance:
    """Denoise a stream of so many chunks with random inputs, of which every tenth is decoded. Raises EngineError."""
    clip, engine, device = bench.clip, bench.engine, bench.engine.device
    step = bench.geometry.config.stream.chunk_frames
    ends, states = [], []
    clip.restart()
    for chunk in chunk_grid(bench.chunks[0].frames + step * (chunks - 1), step):
        clip.denoise(chunk, clip.inputs(chunk))
        ends.append(clip.marks.pop()[2])
        done = chunk.index + 1
        if bench.decodes and done % DECODED == 0:
            for pending in clip.decode(chunk):
                pending.result()
        if done in (SETTLED, chunks) or done % DECODED == 0:
            engine.synchronize()
            states.append(State(done, device.used_bytes(), device.allocations))
    return Endurance([b.since(a) for a, b in itertools.pairwise(ends)], states)


def rows(found: Endurance, recipe: str) -> list[dict[str, Any]]:
    """Rows of a result file."""
    first, last = found.states[0], found.states[-1]
    settled = found.period[SETTLED:] or found.period
    what = f"a stream of {last.chunks} chunks, every {DECODED}th decoded"
    begin, end = (statistics.median(part) for part in (settled[:ENDS], settled[-ENDS:]))
    used = [state.used_bytes / 1e9 for state in found.states]
    return [
        row(f"engine.endurance.period.{recipe}", "device", settled, None, f"{what}: from the end of a chunk to the end of the next"),
        row(f"engine.endurance.drift.{recipe}", "last / first - 1", [end / begin - 1], None,
            f"{what}: medians of the last and the first {ENDS} periods after chunk {SETTLED}", unit="1"),
        row(f"engine.endurance.memory.{recipe}", "whole device", used, None, f"{what}: from chunk {first.chunks} to chunk {last.chunks}", unit="GB"),
        row(f"engine.endurance.growth.{recipe}", "last - first", [(last.used_bytes - first.used_bytes) / 1e9], None,
            f"{what}: whole device, chunk {last.chunks} less chunk {first.chunks}", unit="GB"),
        row(f"engine.endurance.allocations.{recipe}", "count", [float(last.allocations - first.allocations)], None,
            f"{what}: blocks of device or page-locked memory allocated after chunk {first.chunks}", unit="1"),
    ]  # fmt: skip

"""Streaming denoising of the full-size model by sglang, eager and with torch.compile: the peer of engine.denoise.

    python -m sanawm_export.peers.sglang_clip FOLDER -o peers.json

FOLDER holds the package `sglang` as its wheel has it. Weights and inputs are random. Chunk times are taken by the device's clock from the end of a
chunk to the end of the next, without waiting between chunks. Compilation, of steady chunks alone, takes minutes; what was measured before is written
first.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from sanawm.config import WorldConfig
from sanawm.schedule import chunk_grid, latent_frames
from sanawm_export.cuda.bench_rows import commit, row, versions, write
from sanawm_export.peers import PEERS, sglang_model
from sanawm_runtime.bundle.manifest import utc_now

VERSION = PEERS["sglang"].version
VARIANTS = ("sglang", "sglang-compiled")
# The chunks before the first that is measured: the first, the second, and a steady one that finds compiled code and verified kernels.
WARM = 3
# Code of a block is compiled for both kinds of blocks, with and without saving its cache, in several pieces.
RECOMPILE_LIMIT = 64


class Clock:
    """Points in the order of the device's work; of the host's on a CPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._device == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def distances(self) -> list[float]:
        """Seconds from each point to the next."""
        if self._device == "cpu":
            return [b - a for a, b in zip(self._marks, self._marks[1:])]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:])]


def measure(peer: sglang_model.Peer, chunks: int, device: str, compiled: bool) -> list[float]:
    """Seconds of each of `chunks` steady chunks."""
    for index in range(WARM):
        if compiled and index == 2:
            peer.compile(lambda forward: torch.compile(forward, dynamic=False))
        peer.chunk(index)
    clock = Clock(device)
    clock.mark()
    for index in range(WARM, WARM + chunks):
        peer.chunk(index)
        clock.mark()
    if not bool(peer.latents.isfinite().all()):
        raise SystemExit("the peer's latents are not finite")
    return clock.distances()


def rows(variant: str, seconds: list[float], frames: int, chunks: int) -> list[dict[str, Any]]:
    """A row for a chunk and one for a clip of `frames` frames, which has `chunks` chunks."""
    how = "eager" if variant == "sglang" else "torch.compile of each block's streaming forward, default mode"
    what = f"sglang {VERSION} streaming, {how}: five forwards of a steady chunk, random weights, Euler steps by this project"
    whole = [chunks * s for s in seconds]
    clip = row(f"peer.{variant}.denoise.{frames}f.bf16", "device", whole, None, f"{chunks} times the median steady chunk; {what}")
    return [row(f"peer.{variant}.chunk.bf16", "device", seconds, None, what), clip | {"peer_of": f"engine.denoise.{frames}f.bf16"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: both")
    parser.add_argument("--frames", type=int, default=961)
    parser.add_argument("--chunks", type=int, default=10, help="steady chunks that are measured; 0: compile alone")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # type: ignore[attr-defined]
    world = WorldConfig()
    chunks = len(chunk_grid(latent_frames(options.frames), world.stream.chunk_frames))
    modules = sglang_model.load(options.folder)
    model = sglang_model.build(modules, "cuda", torch.bfloat16)
    found: list[dict[str, Any]] = []
    # Blocks stay compiled, so the eager variant comes first.
    for variant in sorted(options.variant or VARIANTS, key=VARIANTS.index):
        begin = time.perf_counter()
        grid = (world.dit.height, world.dit.width)
        peer = sglang_model.Peer(modules, model, WARM + options.chunks, grid, "cuda", torch.bfloat16)
        seconds = measure(peer, options.chunks, "cuda", variant == "sglang-compiled")
        print(f"{variant}: {' '.join(f'{s * 1e3:.0f}' for s in seconds)} ms a chunk, {time.perf_counter() - begin:.0f} s in all", flush=True)
        if seconds:
            found += rows(variant, seconds, options.frames, chunks)
        if options.output and found:
            write(options.output, {
                "hardware": torch.cuda.get_device_name(), "driver": None, "versions": {"sglang": VERSION, **versions()}, "commit": commit(),
                "date": utc_now()[:10], "notes": "random weights and inputs", "rows": found,
            })  # fmt: skip


if __name__ == "__main__":
    main()

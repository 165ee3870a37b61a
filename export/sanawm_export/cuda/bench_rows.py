"""Rows and tables of what `bench` measured, in the format of benchmarks/results."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sanawm_export.cuda.bench import RUNS, Bench
from sanawm_export.cuda.bench_operations import Operation, operations, step_times
from sanawm_export.cuda.cost import Gpu, floor_us
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.engines._cuda_device import Gpu as Device
from sanawm_runtime.engines._cuda_plan import Plan

_VERSIONS = ("cuda-bindings", "triton", "torch", "numpy")
_ENCODES = {"text_encoder": "a prompt's token ids to its embedding on the device", "image_encoder": "the first frame to its latent on the device"}


def measured_gpu(gpu: Gpu, bytes_per_s: float) -> Gpu:
    """A GPU whose memory is as fast as a copy was here; its arithmetic stays that of the data sheet."""
    return replace(gpu, terabytes=bytes_per_s / 1e12, source=f"{gpu.source}; memory as fast as a copy on the device here")


def plans_of(bundle: Bundle) -> dict[str, Plan]:
    return {name: Plan.from_json(bundle.read(entry.file)) for name, entry in bundle.manifest.programs.items()}


def rows(bench: Bench, gpu: Gpu | None) -> list[dict[str, Any]]:
    """Rows of a result file, with the floor on `gpu` where its peaks are known."""
    times, recipe, plans = bench.times, bench.bundle.manifest.precision.recipe, plans_of(bench.bundle)
    steps, chunks = len(bench.geometry.config.stream.timesteps), bench.chunks
    frames = 8 * (chunks[-1].end - 1) + 1

    def floor(counts: Mapping[str, int]) -> float | None:
        return None if gpu is None else sum(n * sum(floor_us(s, gpu) for s in plans[name].steps) for name, n in counts.items()) / 1e6

    kinds = [chunk.kind for chunk in chunks]
    whole: dict[str, int] = {}
    for kind in kinds:
        for name, n in (("camera_first" if kind == "first" else "camera", 1), (f"denoise_{kind}", steps), (f"commit_{kind}", 1)):
            whole[name] = whole.get(name, 0) + n

    def settled(clips: Sequence[Sequence[float]]) -> list[float]:
        """Those of the third chunk on, whose window no longer grows."""
        return [value for clip in clips for value in clip[len(clip) - len(chunks) + 2 :]]

    clip = f"{frames}f.{recipe}"
    found = [row(f"engine.load.{recipe}", "wall", [times.load], None, "reading or making, packing and sending all weights")]
    cases = [
        (f"engine.denoise.{clip}", "wall", times.denoise, floor(whole), f"all {len(chunks)} chunks: inputs to the device, camera programs, {steps} "
         "denoising steps and the clean pass of each; recorded graphs, no waiting between chunks; no decoding"),
        (f"engine.stream.{clip}", "wall", times.clip, None,
         "the same with every chunk decoded and its frames copied to the host beside the next one's denoising"),
        (f"engine.first_frame.{recipe}", "wall", times.first, None,
         "token ids and picture on the host to the first frame on the host; recorded graphs"),
        (f"engine.camera.{recipe}", "device", settled(times.camera), floor({"camera": 1}), "one chunk's camera program"),
        (f"engine.chunk.{recipe}", "device", settled(times.chunk), floor({"denoise_steady": steps, "commit_steady": 1}),
         f"{steps} denoising steps and the clean pass of one chunk, one graph"),
        (f"engine.period.{recipe}", "device", settled(times.period), None, "from the end of a chunk to the end of the next"),
        (f"engine.decode.{recipe}", "device", times.decode, floor({"decode": 1}) if "decode" in plans else None, "one latent frame to eight frames"),
        *((f"engine.{name}.{recipe}", "device", values, floor({name: 1}), _ENCODES[name]) for name, values in times.encode.items()),
    ]  # fmt: skip
    found += [row(*case) for case in cases if case[2]]
    if settled(times.period):
        found += _steadiness(recipe, [settled([clip]) for clip in times.period], f"chunks 3 to {len(chunks)}, from end to end")
    memory = bench.memory
    found.append(row(f"engine.memory.{recipe}", "most", [memory.most / 1e9], None, "whole device while clips are made, without encoders", unit="GB"))
    found.append(row(f"engine.memory.growth.{recipe}", "most - least", [(memory.most - memory.least) / 1e9], None,
                      "whole device from the end of the first chunk on", unit="GB"))  # fmt: skip
    found.append(row(f"engine.allocations.{recipe}", "count", [float(memory.allocations)], None,
                      "blocks of device or page-locked memory allocated after the first chunk", unit="1"))  # fmt: skip
    return found


def _steadiness(recipe: str, clips: Sequence[Sequence[float]], includes: str) -> list[dict[str, Any]]:
    """How far chunks' times lie from the middle one: each chunk's median over the clips, which tells whether time depends on the place in the clip,
    and every single one, which tells how far the device's clock wanders."""
    found = []
    for name, metric, values in (
        ("steadiness", f"largest distance of a chunk's median of {len(clips)} clips from the median", [statistics.median(c) for c in zip(*clips)]),
        ("steadiness.single", "largest distance of a single chunk's time from the median", [value for clip in clips for value in clip]),
    ):
        middle = statistics.median(values)
        spread = max(abs(value - middle) for value in values) / middle
        found.append(row(f"engine.{name}.{recipe}", metric, [spread], None, includes, unit="1"))
    return found


def row(case: str, metric: str, values: Sequence[float], floor: float | None, includes: str, *, unit: str = "s") -> dict[str, Any]:
    return {
        "case": case, "metric": metric, "value": statistics.median(values), "unit": unit, "min": min(values), "max": max(values), "n": len(values),
        "floor": floor, "peer": None, "peer_value": None, "includes": includes,
    }  # fmt: skip


def operation_rows(program: str, recipe: str, found: Sequence[Operation], runs: int) -> list[dict[str, Any]]:
    """Rows of a program's operations: microseconds of all launches of one operation together."""
    return [
        {
            "case": f"engine.{program}.{operation.name}.{recipe}", "metric": "device", "value": operation.us, "unit": "us", "min": operation.least_us,
            "max": operation.most_us, "n": runs, "floor": operation.floor_us, "peer": None, "peer_value": None,
            "includes": f"{operation.count} launches of {operation.kernel} in place", "launches": operation.count, "class": operation.kind,
        }
        for operation in found
    ]  # fmt: skip


def all_operations(bench: Bench, gpu: Gpu, runs: int) -> list[dict[str, Any]]:
    """Rows of the operations of a steady denoising step, its clean pass and a decoded latent frame."""
    recipe, world = bench.bundle.manifest.precision.recipe, bench.geometry.config
    softmax = frozenset(i for i in range(world.dit.depth) if world.dit.is_softmax(i))
    bound = bench.clip.bound(bench.chunks[-1])
    found = []
    for program in [f"{stage}_{bench.chunks[-1].kind}" for stage in ("denoise", "commit")] + ["decode"] * bench.decodes:
        buffers = bench.clip.decode_buffers() if program == "decode" else bound
        plan = Plan.from_json(bench.bundle.read(bench.bundle.manifest.programs[program].file))
        summed = operations(plan, step_times(bench.engine, program, buffers, runs), gpu, softmax)
        found += operation_rows(program, recipe, summed, runs)
    return found


def document(bench: Bench, device: Device, found: list[dict[str, Any]], gpu: Gpu | None) -> dict[str, Any]:
    """A result file."""
    source = bench.bundle.manifest.checkpoint.source
    floors = "" if gpu is None else f"; floors from {gpu.source}"
    return {
        "hardware": device.name, "driver": device.driver_version, "versions": versions(), "commit": commit(), "date": utc_now()[:10],
        "notes": f"random inputs, weights {source}, medians of {RUNS} or more{floors}", "rows": found, "bundle": bench.bundle.digest,
        "copy_terabytes_per_s": None if gpu is None else gpu.terabytes,
        "chunk_seconds": bench.times.chunk, "period_seconds": bench.times.period, "spans": [asdict(span) for span in bench.times.spans],
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what the engine runs on, where it is installed."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that this runs from, if it runs from one."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)

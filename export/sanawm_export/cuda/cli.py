"""`sanawm plan` and `sanawm bench`: what the CUDA engine launches, with its bounds, and how long that takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from sanawm.config import preset
from sanawm.console import json_option, print_json, stdout
from sanawm.errors import UserError
from sanawm.programs import Geometry
from sanawm.schedule import chunk_grid, first_chunk_frames, latent_frames
from sanawm_export import peers
from sanawm_export.cuda import arena, cost
from sanawm_export.cuda.lower import lower_parts
from sanawm_export.cuda.recipes import planned_formats
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.targets import resolve_target

# Prompts begin with an instruction of 1,057 characters; a plan without a tokenizer takes it to be this long.
PREFIX_TOKENS = 240


@click.command("plan")
@click.option("--target", default="h200", show_default=True, help="rtx5090, h200, sm_120, ...")
@click.option("--precision", default="bf16", show_default=True, help="As for build-engine: bf16, fp8, nvfp4, mixed, or a recipe's name or file.")
@click.option("--calibration", type=click.Path(path_type=Path), help="File of `sanawm calibrate`, as for build-engine.")
@click.option("--config", "size", default="full", show_default=True, help="Preset: tiny or full.")
@click.option("--frames", default=961, show_default=True, help="Clip length 8k + 1.")
@click.option("--program", default="denoise_steady", show_default=True, help="Program whose operations are listed.")
@click.option("--gpu", "on", type=click.Choice(list(cost.GPUS)), help="GPU whose peaks give the floors; default: the target.")
@click.option("--each", is_flag=True, help="Every launch instead of sums over the blocks.")
@json_option
def plan(
    target: str, precision: str, calibration: Path | None, size: str, frames: int, program: str, on: str | None, each: bool, as_json: bool
) -> None:  # fmt: skip
    """Print the launch plan of a program, its memory, and projections; computed, nothing is measured."""
    place = resolve_target(target)
    if place.capability is None or "cuda" not in place.precisions:
        raise UserError(f"the cuda engine does not serve {place.name}; choose a GPU such as h200 or rtx5090")
    name = on or place.name
    if name not in cost.GPUS:
        raise UserError(f"the peaks of {name} are not known; choose one of {', '.join(cost.GPUS)} with --gpu")
    world, latents = preset(size), latent_frames(frames)
    first = first_chunk_frames(latents, world.stream.chunk_frames)
    geometry = Geometry(world, world.dit.text_tokens + PREFIX_TOKENS, first, "bfloat16")
    formats = planned_formats(world.dit, precision, calibration)
    parts = lower_parts(geometry, formats, int(place.capability.removeprefix("sm_")))
    plans = {key: low.plan for part in parts.values() for key, low in part.programs.items()}
    if program not in plans:
        raise UserError(f"there is no program '{program}'; choose one of {', '.join(plans)}")
    chunks = len(chunk_grid(latents, world.stream.chunk_frames))
    projections = {
        gpu.name: cost.clip_seconds(plans, gpu, chunks, len(world.stream.timesteps))
        for gpu in cost.GPUS.values()
        if not formats.uses("nvfp4") or gpu.tflops["nvfp4"]
    }
    chosen, gpu = plans[program], cost.GPUS[name]
    if as_json:
        print_json(_document(chosen, gpu, projections))
        return
    stdout.print(_each(chosen, gpu) if each else _sums(chosen, gpu))
    total = cost.cost(chosen, gpu)
    stdout.print(
        f"{program}: {total.steps} launches and copies, {total.flops / 1e12:.2f} TFLOP, {total.nbytes / 1e9:.2f} GB at least; "
        f"floor {total.floor_us / 1e3:.2f} ms on {gpu.name} ({gpu.source})"
    )
    stdout.print(f"arena {chosen.arena / 1e6:.1f} MB (largest sum alive at one time {arena.peak(chosen) / 1e6:.1f} MB)")
    given = cost.Assumptions()
    shares = ", ".join(f"{name} {share:.0%}" for name, share in given.shares.items())
    stdout.print(
        f"Projections for {frames} frames, denoising only, never measurements (assumed of every GPU as measured on an H200: operations at a share of "
        f"their floor, {shares}; memory at {given.memory:.0%} of the data sheet; {given.gap_us:g} us more a launch):"
    )
    for key, seconds in projections.items():
        stdout.print(f"  {key}: {seconds:.1f} s")


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--frames", default=961, show_default=True, help="Clip length 8k + 1.")
@click.option("--clips", default=9, show_default=True, help="How often the whole clip is denoised; two of them are decoded, too.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random latents, text and maps.")
@click.option("--operations", default=10, show_default=True, help="Runs in which every launch is timed; 0: none.")
@click.option("--endurance", default=0, show_default=True, help="Chunks of a long stream, whose time and memory are watched; 0: none.")
@click.option("--peer", type=click.Choice(list(peers.PEERS)), help="Time this on the same GPU, too, afterwards.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Result file to write.")
@click.option("--timeline", type=click.Path(path_type=Path), help="PNG of what the streams do.")
@json_option
def bench(
    bundle: Path, frames: int, clips: int, seed: int, operations: int, endurance: int, peer: str | None, out: Path | None,
    timeline: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Time a CUDA bundle on this machine's GPU, stage by stage and launch by launch, with random inputs."""
    from sanawm_export.cuda import bench_endurance, bench_rows
    from sanawm_export.cuda.bench import Bench
    from sanawm_export.cuda.bench_operations import copy_bandwidth
    from sanawm_export.cuda.bench_timeline import draw
    from sanawm_runtime.bundle import Bundle
    from sanawm_runtime.engines.cuda import CudaEngine

    opened = Bundle.open(bundle)
    if opened.manifest.target.engine != "cuda":
        raise UserError(f"{bundle} is for the {opened.manifest.target.engine} engine; build one with --engine cuda")
    if peer is not None:
        peers.folder(peer)
    engine = CudaEngine(opened)
    try:
        gpu = cost.GPUS.get(opened.manifest.target.name)
        if gpu is not None:
            gpu = bench_rows.measured_gpu(gpu, copy_bandwidth(engine.device))
        timed = Bench(opened, frames, engine, clips=clips, seed=seed)
        timed.run()
        found = bench_rows.rows(timed, gpu)
        if operations and gpu is not None:
            found += bench_rows.all_operations(timed, gpu, operations)
        document = bench_rows.document(timed, engine.device, found, gpu)
        if endurance:
            endured = bench_endurance.run(timed, endurance)
            found += bench_endurance.rows(endured, opened.manifest.precision.recipe)
            document["endurance_seconds"] = endured.period
        del timed.clip
    finally:
        engine.close()
    if timeline is not None and timed.times.spans:
        draw(timeline, timed.times.spans, f"{document['hardware']}, {frames} frames, {opened.manifest.precision.recipe}")
    if out is not None:
        bench_rows.write(out, document)
    if peer is not None:
        result = peers.run(peer, frames)
        found += result["rows"]
        document["versions"] |= result["versions"]
        peers.attach(found)
        if out is not None:
            bench_rows.write(out, document)
    if as_json:
        print_json(document)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("case", "value", "unit", "min", "max", "n", "floor", "peer"):
        table.add_column(column)
    for row in found:
        numbers = [*(f"{row[key]:.4g}" for key in ("min", "max")), str(row["n"]), "" if row["floor"] is None else f"{row['floor']:.4g}"]
        numbers.append("" if row["peer"] is None else f"{row['peer']}: {row['peer_value']:.4g}")
        table.add_row(row["case"], f"{row['value']:.4g}", row["unit"], *numbers)
    stdout.print(table)


def _sums(chosen: Plan, gpu: cost.Gpu) -> Table:
    table = _table("operation", "count")
    for name, count, nbytes, flops, floor in cost.by_operation(chosen.steps, gpu):
        table.add_row(name, str(count), f"{nbytes / 1e6:.1f}", f"{flops / 1e9:.1f}", f"{floor:.1f}")
    return table


def _each(chosen: Plan, gpu: cost.Gpu) -> Table:
    table = _table("launch", "kernel", "grid")
    for step in chosen.steps:
        kernel, grid = (step.kernel, "x".join(map(str, step.grid))) if isinstance(step, Launch) else ("copy", "")
        nbytes = step.read_bytes + step.write_bytes
        table.add_row(step.label, kernel, grid, f"{nbytes / 1e6:.1f}", f"{step.flops / 1e9:.1f}", f"{cost.floor_us(step, gpu):.1f}")
    return table


def _table(*first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in first:
        table.add_column(name)
    for name in ("MB", "GFLOP", "floor us"):
        table.add_column(name, justify="right")
    return table


def _document(chosen: Plan, gpu: cost.Gpu, projections: dict[str, float]) -> dict[str, Any]:
    return {
        "program": chosen.program, "arena": chosen.arena, "peak": arena.peak(chosen), "gpu": gpu.name, "cost": asdict(cost.cost(chosen, gpu)),
        "operations": [dict(zip(("name", "count", "bytes", "flops", "floor_us"), row)) for row in cost.by_operation(chosen.steps, gpu)],
        "projections_seconds": projections, "assumptions": asdict(cost.Assumptions()),
    }  # fmt: skip

"""Tuner of the products with descriptors: times tiles at the block's shapes on the GPU at hand and proposes them for `gemm/table.py`.

    python benchmarks/tune_products.py --kind bf16 --kind fp8_rows
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sanawm_kernels.gemm.plans import Config

# Name: columns, depth and epilogue of `kernels_gemm`.
PRODUCTS = {"merged": "plain", "ffn_in": "silu", "ffn_out": "plain", "square": "residual"}
# Columns, warps and stages that fit 227 KiB; a wide tile needs 8 warps for its sums.
TILES = ((256, 8, 3), (256, 8, 4), (128, 8, 4), (128, 8, 5), (128, 4, 4))

# Of consumers that take turns: chunks of the epilogue, stages and chunks in flight. Of those that share a tile: chunks, and chunks in flight.
TURNS = ((64, 6, 1), (64, 5, 2), (128, 5, 1))
SHARED = ((64, 1), (64, 2), (32, 4))


def candidates(kind: str) -> Iterator[Config]:
    """Tiles to try for operands of a kind, of the kernels whose consumers take turns or share a tile and of those without."""
    depth = 64 if kind == "bf16" else 128
    for (columns, warps, stages), slices, group in product(TILES, (1, 2, 4), (4, 8, 21)):
        if columns // slices >= 64:
            yield Config(128, columns, depth, group, warps, stages, slices, persistent=1, form="descriptors")
    for (chunk, stages, ring), slices, group in product(TURNS, (1, 2), (4, 8, 21)):
        if chunk >= 128 // slices:
            yield Config(128, 128, depth, group, 4, stages, slices, persistent=1, form="pingpong", chunk=chunk, ring=ring)
    for (chunk, ring), group in product(SHARED, (7, 14)):
        yield Config(192, 256, depth, group, 4, 3, 8, persistent=1, form="wide", chunk=chunk, ring=ring)


def prepared(name: str, kind: str) -> Callable[[Config], Any]:
    """The product of fresh random operands as a function of its tile."""
    import kernels_gemm as gemm

    from sanawm_kernels.gemm import triton as fused

    columns, depth = gemm.SHAPES[name]
    x, weight = gemm.operand(gemm.rand(1, gemm.M, depth), kind), gemm.operand(gemm.rand(columns, depth), kind)
    epilogue = gemm.EPILOGUES[PRODUCTS[name]][0](columns)
    return lambda config: fused.linear(x, weight, epilogue, config=config)


def compiles(job: tuple[str, str, Config]) -> str | None:
    """Compile a candidate into Triton's cache; what went wrong, if anything."""
    import torch
    import triton

    try:
        prepared(job[0], job[1])(job[2])
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


@click.command()
@click.option("--kind", "kinds", multiple=True, default=("bf16", "fp8_rows"), show_default=True, type=click.Choice(["bf16", "fp8", "fp8_rows"]))
@click.option("--full-power", is_flag=True, help="Time half a second and more of each tile, at the clock that the power limit leaves.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Processes that compile.")
def main(kinds: tuple[str, ...], full_power: bool, workers: int) -> None:
    import torch
    from kernel_timing import measure, sustained

    if not torch.cuda.is_available():
        raise click.UsageError("no CUDA device was found; tiles are timed on the GPU they are for")
    jobs = [(name, kind, config) for kind in kinds for name in PRODUCTS for config in candidates(kind)]
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compiles, jobs)))
    for name, kind in product(PRODUCTS, kinds):
        call = prepared(name, kind)
        found = []
        for job in (job for job in jobs if job[:2] == (name, kind)):
            if failures[job] is not None:
                click.echo(f"{name} {kind} {job[2]}: {failures[job]}")
                continue
            run = functools.partial(call, job[2])
            found.append((sustained(run) if full_power else measure(run).median, job[2]))
        for time, config in sorted(found, key=lambda entry: entry[0])[:5]:
            click.echo(f"{name:8s} {kind:8s} {time:8.1f} us  {config}")


if __name__ == "__main__":
    main()

"""Tuner of the gated delta network: tries launch settings and proposes rows for its tuning table.

    python benchmarks/tune_kernels.py                               # on the device to tune for: the whole block's time with each candidate
    python benchmarks/tune_kernels.py --inspect sm_120 --only apply # without a device: registers, spills and shared memory of each candidate
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sanawm_kernels.aot.cli import parse_targets
from sanawm_kernels.aot.compile import CompileError, compile_variant
from sanawm_kernels.gdn import plans
from sanawm_kernels.tuning import Row

CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "prepare": {},
    "summarize": {"R": (16, 32, 64), "SPLITS": (1, 2), "FUSED": (False, True), "STORE_KEYS": (True, False)},
    "combine": {"ROWS": (16, 32, 64)},
    "apply": {"R": (32, 64, 128), "TILES": (1, 2, 4, 7)},
}
WARPS = {"prepare": (4, 8, 16), "summarize": (4, 8, 16), "combine": (4, 8), "apply": (4, 8)}
STAGES = {"prepare": (1,), "summarize": (1, 2, 3), "combine": (1, 2), "apply": (1, 2)}
# The official model's chunk: both branches, 3 frames of 22 x 40 tokens, 20 heads of 112, read-only with a carried state.
BLOCK = plans.Problem(1, 20, 112, 3, 880, (112 * 880) ** -0.5, commit=False)


def candidates(phase: str, target: int) -> Iterator[Row]:
    """Rows to try for a phase on a target."""
    names = tuple(CHOICES[phase])
    for *values, warps, stages in product(*CHOICES[phase].values(), WARPS[phase], STAGES[phase]):
        yield Row(phase, (target,), dict(zip(names, values)), warps, stages, datetime.date.today().isoformat(), "", {"precision": BLOCK.precision})


def describe(row: Row) -> str:
    """Settings of a row on one line."""
    settings = " ".join(f"{name}={value}" for name, value in row.settings.items())
    return f"{row.kernel:10s} {settings:48s} warps {row.num_warps:2d} stages {row.num_stages}"


def inspect(row: Row, target: int) -> dict[str, Any] | None:
    """Index entry of the phase compiled with `row`; None where it does not compile or fit."""
    with plans.trying(row):
        variant = next(v for v in plans.plan(BLOCK, target) if f".{row.kernel}." in v.name)
    try:
        return compile_variant(replace(variant, spill_reason="tuning"), target)[1]
    except CompileError as error:
        click.echo(f"{describe(row)}  {str(error).splitlines()[0][-90:]}")
        return None


def block() -> Callable[[], Any]:
    """Binds a block's launches on fresh random inputs, under whatever row is being tried."""
    import os

    import torch

    from sanawm_kernels.gdn import fused
    from sanawm_kernels.gdn.samples import sample

    seed = int.from_bytes(os.urandom(3), "little")
    x = sample(BLOCK.batch, BLOCK.heads, BLOCK.head_dim, BLOCK.frames, BLOCK.tokens, dtype=torch.bfloat16, device="cuda", seed=seed)
    state = fused.block_gdn(x.main, x.camera, x.gates, **x.options).state
    return lambda: fused.bind(x.main, x.camera, x.gates, **x.options, state=state, commit=False)


@click.command()
@click.option("--only", "phases", multiple=True, type=click.Choice(sorted(CHOICES)), help="Phases to tune; may be repeated.")
@click.option("--inspect", "inspected", metavar="TARGET", help="Compile for this architecture and list what the code needs; times nothing.")
@click.option("--repeat", default=60, show_default=True, type=click.IntRange(50), help="Timed runs of each candidate.")
def main(phases: tuple[str, ...], inspected: str | None, repeat: int) -> None:
    if inspected is not None:
        (target,) = parse_targets(inspected)
        for phase in phases or CHOICES:
            for row in candidates(phase, target):
                if entry := inspect(row, target):
                    needs = f"registers {entry['registers']:3d} spills {entry['spill_bytes']:4d} shared {entry['shared_bytes']:6d}"
                    click.echo(f"{describe(row)}  {needs}")
        return
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("no CUDA device was found; run this on the device to tune for, or use --inspect TARGET")
    import kernel_timing

    major, minor = torch.cuda.get_device_capability()
    bind = block()
    for phase in phases or CHOICES:
        tried: list[tuple[float, Row]] = []
        for row in candidates(phase, major * 10 + minor):
            entry = inspect(row, major * 10 + minor)
            if entry is None or entry["spill_bytes"]:
                continue
            with plans.trying(row):
                time = kernel_timing.measure(bind().run, repeat).median
            tried.append((time, row))
            click.echo(f"{describe(row)}  {time:8.1f} us")
        time, best = min(tried, key=lambda pair: pair[0])
        reason = f"measured on {torch.cuda.get_device_name()}: the block of 3 frames takes {time:.1f} us, the median of {len(tried)} candidates "
        reason += f"{sorted(t for t, _ in tried)[len(tried) // 2]:.1f}"
        click.echo(
            f'    Row("{phase}", ({major * 10 + minor},), {best.settings}, {best.num_warps}, {best.num_stages}, "{best.date}",\n'
            f'        "{reason}", {best.when}),'
        )


if __name__ == "__main__":
    main()

"""Benchmark of the fused gated delta network: both branches of a block, from raw projections to outputs.

    python benchmarks/kernels_gdn.py                          # on a CUDA device: time, errors against float64, result file
    python benchmarks/kernels_gdn.py --peer sglang-*.whl      # with sglang's Triton kernels in the same run
    python benchmarks/kernels_gdn.py --dry-run                # without a device: a small block in Triton's interpreter, no times, no file
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

NOTES = (
    "CUDA graphs, second-level cache overwritten before every run; floor: bytes of q, k, v and outputs of both branches at the device's copy "
    "bandwidth measured in the same run; fresh random inputs with outlier channels"
)
INCLUDES = "raw projections to outputs of both branches: short conv, norms, rotations, gates, scans, division, inverse UCPE; random weights"
SIZES = {"full": (20, 112, (22, 40)), "dry": (2, 16, (2, 3))}
# Input sets that a graph goes through: each moves some 200 MB, so that none finds its own in the second-level cache.
SETS = 5
FIELDS = ("s", "z", "s_cam")


@click.command()
@click.option("--frames", multiple=True, default=(3,), show_default=True, help="Frames of the chunk; may be repeated.")
@click.option("--precision", multiple=True, default=("bf16",), show_default=True, type=click.Choice(["bf16", "tf32", "ieee"]))
@click.option("--repeat", default=100, show_default=True, type=click.IntRange(50), help="Timed runs of each case.")
@click.option("--chunks", default=40, show_default=True, type=click.IntRange(0), help="Chunks that carry the state whose error is compared; 0: none.")
@click.option("--peer", type=click.Path(exists=True, path_type=Path), help="sglang's wheel, or the directory it was unpacked to.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Results file (default: benchmarks/results/<hardware>-gdn.json).")
@click.option("--dry-run", is_flag=True, help="Check everything but the times on a small block, without a device.")
def main(
    frames: tuple[int, ...], precision: tuple[str, ...], repeat: int, chunks: int, peer: Path | None, output: Path | None, dry_run: bool
) -> None:  # fmt: skip
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device was found; use --dry-run to check the benchmark without one")
    rows: list[dict[str, Any]] = []
    for T in frames:
        for mode in ("ieee",) if dry_run else precision:
            rows += errors(T, mode, dry_run) + (carried(T, mode, dry_run, chunks) if chunks else [])
            if not dry_run:
                rows += times(T, mode, repeat, peer)
        if peer is not None:
            rows += peer_errors(T, peer, dry_run)
    if dry_run:
        click.echo(json.dumps(rows, indent=1))
        return
    import kernel_timing

    result = {**kernel_timing.environment(), "notes": NOTES, "rows": rows}
    hardware = result["hardware"].lower().replace("nvidia ", "").replace(" ", "-")
    path = output or kernel_timing.ROOT / "benchmarks" / "results" / f"{hardware}-gdn.json"
    kernel_timing.write(path, result)
    click.echo(path)


def number(case: str, metric: str, value: float, includes: str) -> dict[str, Any]:
    """A row that is not a time."""
    plain = {"min": None, "max": None, "n": 1, "floor": None, "peer": None, "peer_value": None}
    return {"case": case, "metric": metric, "value": value, "unit": "1", **plain, "includes": includes}


def inputs(T: int, dry: bool, seed: int = 0, clamp: bool = False) -> Any:
    import torch

    from sanawm_kernels.gdn.samples import sample

    heads, width, grid = SIZES["dry" if dry else "full"]
    dtype, device = (torch.float32, "cpu") if dry else (torch.bfloat16, "cuda")
    return sample(1, heads, width, T, grid[0] * grid[1], dtype=dtype, device=device, seed=seed, clamp=clamp)


def errors(T: int, mode: str, dry: bool) -> list[dict[str, Any]]:
    """Relative L2 error against float64 of outputs that held NaN before, and of the state."""
    import torch

    from sanawm_kernels.gdn import fused
    from sanawm_kernels.gdn.samples import reference, relative_error

    x = inputs(T, dry)
    poisoned = {name: torch.full(x.main.q.shape, torch.nan, dtype=x.main.q.dtype, device=x.main.q.device) for name in ("main_out", "camera_out")}
    result = fused.block_gdn(x.main, x.camera, x.gates, **x.options, precision=mode, **poisoned)
    wanted_main, wanted_camera, state = reference(x)
    found: dict[str, tuple[Any, Any]] = {"main": (result.main, wanted_main), "camera": (result.camera, wanted_camera)}
    found |= {field: (getattr(result.state, field), getattr(state, field)) for field in FIELDS}
    case = f"gdn.block.{T}f.{mode}"
    includes = "against the plain definition in float64; outputs held NaN before"
    return [number(case, f"relative_l2.{name}", relative_error(*pair), includes) for name, pair in found.items()]


def carried(T: int, mode: str, dry: bool, chunks: int) -> list[dict[str, Any]]:
    """Error of the state after 40 chunks over that after one, each averaged over four chunks."""
    from sanawm_kernels.gdn import fused
    from sanawm_kernels.gdn.samples import reference, relative_error

    series: dict[str, list[float]] = {field: [] for field in FIELDS}
    state = wanted = None
    for seed in range(8 if dry else chunks):
        x = inputs(T, dry, seed)
        wanted = reference(x, None if wanted is None else wanted[2])
        state = fused.block_gdn(x.main, x.camera, x.gates, **x.options, precision=mode, state=state).state
        for field in FIELDS:
            series[field].append(relative_error(getattr(state, field), getattr(wanted[2], field)))
    includes = f"mean error of the last four of {len(series['s'])} carried chunks over that of the first four"
    case = f"gdn.block.{T}f.{mode}"
    return [number(case, f"carried_ratio.{field}", sum(found[-4:]) / sum(found[:4]), includes) for field, found in series.items()]


def times(T: int, mode: str, repeat: int, peer: Path | None) -> list[dict[str, Any]]:
    """The block, read-only and committing, with its peer; each of its launches alone."""
    import kernel_timing

    from sanawm_kernels.gdn import fused
    from sanawm_kernels.tokenwise.launch import launch

    seed = int.from_bytes(os.urandom(3), "little")
    samples = [inputs(T, False, seed + i) for i in range(SETS)]
    x = samples[0]
    states = [fused.block_gdn(s.main, s.camera, s.gates, **s.options, precision=mode).state for s in samples]
    floor = 8 * x.main.q.numel() * x.main.q.element_size() / kernel_timing.copy_bandwidth() * 1e6

    def row(case: str, calls: Sequence[Callable[..., Any]], includes: str, **fields: Any) -> dict[str, Any]:
        time = kernel_timing.measure(calls, repeat)
        measured = {"value": time.median, "unit": "us", "min": time.least, "max": time.most, "n": time.n, "sets": len(calls)}
        return {"case": case, "metric": "time", **measured, "floor": None, "peer": None, "peer_value": None, "includes": includes, **fields}

    theirs: dict[str, Any] = {}
    if peer is not None:
        import peer_sglang

        module = peer_sglang.load(peer)
        calls = [peer_sglang.block(module, s, SIZES["full"][2]) for s in samples]
        theirs = {"peer": "sglang, Triton kernels and the torch code around them", "peer_value": kernel_timing.measure(calls, repeat).median}
    case, rows = f"gdn.block.{T}f.{mode}", []
    for form, commit in (("", False), (".commit", True)):
        bound = [
            fused.bind(s.main, s.camera, s.gates, **s.options, state=state, commit=commit, precision=mode) for s, state in zip(samples, states)
        ]
        includes = INCLUDES + ("; states and tails written" if commit else "; read-only")
        rows.append(row(case + form, [call.run for call in bound], includes, floor=floor, **({} if commit else theirs)))
    for phase, launches in zip(("prepare", "summarize", "combine", "apply"), zip(*(call.launches for call in bound))):
        calls = [lambda v=variant, a=arguments: launch(v, a) for variant, arguments in launches] * 2
        rows.append(row(f"gdn.{phase}.{T}f.{mode}", calls, "one launch of the committing form"))
    return rows


def peer_errors(T: int, peer: Path, dry: bool) -> list[dict[str, Any]]:
    """The peer's errors against float64, under its settings (RMS clamp); on a CPU those of its plain path, which checks the harness."""
    import peer_sglang

    from sanawm_kernels.gdn.samples import reference, relative_error

    x = inputs(T, dry, clamp=True)
    found = peer_sglang.block(peer_sglang.load(peer), x, SIZES["dry" if dry else "full"][2], "torch" if dry else "triton")()
    wanted = reference(x)[:2]
    includes = "sglang, against the plain definition in float64"
    return [
        number(f"gdn.peer.{T}f", f"relative_l2.{name}", relative_error(mine, exactly), includes)
        for name, mine, exactly in zip(("main", "camera"), found, wanted)
    ]


if __name__ == "__main__":
    main()

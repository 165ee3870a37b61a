"""The `calibrate` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sanawm_calibration.run import Outcome

_DTYPES = ("float32", "bfloat16")


@click.command("calibrate")
@click.option("--checkpoint", required=True, help="Checkpoint: a folder, a file, or hf://owner/repo[@revision].")
@click.option("--data", default="generated", show_default=True, help="Calibration set: a manifest, a folder, or 'generated'.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("calibration.json"), show_default=True, help="File to write.")
@click.option("--clips", type=click.IntRange(1), default=16, show_default=True, help="Clips to take, or to generate.")
@click.option("--chunks", type=click.IntRange(1), default=8, show_default=True, help="Chunks of 24 frames to take of each clip.")
@click.option("--rows", type=click.IntRange(0), default=128, show_default=True, help="Sampled inputs to keep for each layer.")
@click.option("--device", default="cpu", show_default=True, help="torch device of the rollouts: cpu, cuda, cuda:1, …")
@click.option("--dtype", type=click.Choice(_DTYPES), default=None, help="Reference arithmetic.  [default: float32 on cpu, bfloat16 on cuda]")
@click.option("--search", is_flag=True, help="Search the cheapest mix of formats that passes the quality gates.")
@click.option("--target", default="rtx5090", show_default=True, help="GPU whose rates the search weighs costs with.")
@click.option("--report", type=click.Path(path_type=Path), default=None, help="Write a quality report of --recipe: FILE.html and FILE.json.")
@click.option("--recipe", default=None, help="Recipe to report on: a name or a .toml file.  [default: nvfp4-guarded, or mixed with --search]")
@click.option("--judged", type=click.IntRange(1), default=2, show_default=True, help="Clips that the search and the report roll out again.")
@click.option("--text-encoder", default=None, help="Folder or address of the Gemma-2 text encoder, where the checkpoint has none.")
@click.option("--vae", default=None, help="Folder or address of the VAE, where the checkpoint has none.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def calibrate(
    checkpoint: str,
    data: str,
    output: Path,
    clips: int,
    chunks: int,
    rows: int,
    device: str,
    dtype: str | None,
    search: bool,
    target: str,
    report: Path | None,
    recipe: str | None,
    judged: int,
    text_encoder: str | None,
    vae: str | None,
    as_json: bool,
) -> None:
    """Record what quantization needs to know about a checkpoint.

    Rolls the distilled student out over a calibration set and writes statistics of every layer's input. Interrupted runs go on where they
    stopped. The file goes to `sanawm build-engine --precision RECIPE --calibration FILE`.
    """
    import torch

    from sanawm.model.checkpoint import open_checkpoint
    from sanawm_calibration.recipe import DEFAULT_RECIPE
    from sanawm_calibration.run import Request, run, summary

    chosen = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    request = Request(
        open_checkpoint(checkpoint, text_encoder=text_encoder, vae=vae),
        data,
        output,
        clips,
        chunks,
        rows,
        device,
        getattr(torch, chosen),
        search,
        target,
        recipe or ("mixed" if search else DEFAULT_RECIPE),
        report,
        judged,
    )
    with _progress() as show:
        outcome = run(request, show)
    if as_json:
        click.echo(json.dumps(summary(outcome), indent=1, allow_nan=False))
    else:
        _print(outcome)


class _progress:
    """A bar for each phase of the work, on standard error."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.fields[phase]:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, TextColumn("{task.fields[item]}"), console=Console(stderr=True))
        self.tasks: dict[str, Any] = {}
        self.bars.start()
        return self.show

    def show(self, phase: str, item: str, done: int, total: int) -> None:
        for other, task in self.tasks.items():
            if other != phase:
                self.bars.update(task, completed=self.bars.tasks[task].total, item="")
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, phase=phase, item=item, total=total)
        self.bars.update(self.tasks[phase], completed=done, total=total, item=item)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            for task in self.bars.tasks:
                self.bars.update(task.id, completed=task.total, item="")
        self.bars.stop()


def _print(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    from sanawm_calibration.gates import VELOCITY_SQNR
    from sanawm_calibration.report import CAVEAT

    console = Console()
    calibration = outcome.calibration
    frames = [clip["frames"] for clip in calibration.clips]
    console.print(f"{len(frames)} clips of {min(frames)} to {max(frames)} frames, {len(calibration.summary)} distinct layer inputs")
    if outcome.search is not None:
        unit, name = (1e9, "GB") if outcome.search.frontier[-1].nbytes > 1e8 else (1e6, "MB")
        velocity = f"worst velocity SQNR (≥ {VELOCITY_SQNR:g} dB)"
        table = Table("policy", f"weights, {name}", "least ms a chunk", velocity, "camera cosine", title="Frontier")
        way = outcome.search.frontier
        stride = max(1, len(way) // 12)
        shown = [p for i, p in enumerate(way) if i % stride == 0 or p.measured or i == len(way) - 1] + outcome.recipes
        for point in sorted(shown, key=lambda p: p.nbytes):
            numbers = (f"{point.nbytes / unit:.3f}", f"{point.seconds * 1e3:.3f}", f"{point.velocity_sqnr:.1f}", f"{point.camera_cosine:.3f}")
            table.add_row(point.label or "…", *numbers, style="bold" if point.measured else None)
        console.print(table)
        console.print(f"Bold rows are measured, the others predicted; times are lower bounds from assumed peak rates of {outcome.search.target}.")
    if outcome.report is not None:
        report = outcome.report
        state = "passes every gate" if report.passed else "fails " + "; ".join(f"{g.name} ({g.value:.3g} < {g.limit:.3g})" for g in report.failed[:6])
        console.print(f"Recipe {report.recipe} {state}. {sum(report.nbytes.values()) / 1e9:.3f} GB of weights.")
        console.print(CAVEAT)
    for path in outcome.files:
        console.print(f"wrote {path}")

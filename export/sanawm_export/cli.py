"""`sanawm export`, `build-engine` and `parity`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from sanawm.config import PRESETS
from sanawm.console import json_option, print_json, progress, stderr, stdout
from sanawm.errors import UserError
from sanawm.schedule import latent_frames

if TYPE_CHECKING:
    from sanawm_runtime.targets import Target


def _checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--revision", help="Hub revision."),
            click.option("--offline", is_flag=True, help="Use only what is in the local hub cache."),
            click.option("--text-encoder", help="Folder or hub address of the Gemma-2 text encoder."),
            click.option("--vae", help="Folder or hub address of the VAE."),
            click.option("--frames", default=961, show_default=True, help="Clip length 8k + 1 whose remainder fixes the first chunk."),
        )
    ):
        command = option(command)
    return command


def _open(source: str, revision: str | None, offline: bool, text_encoder: str | None, vae: str | None) -> Any:
    from sanawm.model.checkpoint import open_checkpoint

    return open_checkpoint(source, revision=revision, offline=offline, text_encoder=text_encoder, vae=vae)


@click.command()
@click.option("--checkpoint", "source", required=True, help="Path or hf://owner/repo[@revision].")
@_checkpoint_options
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--program", "names", multiple=True, help="Only these programs; may be repeated.")
@click.option("--cpu", is_flag=True, help="Rewrite bf16 graphs so that ONNX Runtime's CPU provider runs them.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Directory to create.")
@json_option
def export(
    source: str, revision: str | None, offline: bool, text_encoder: str | None, vae: str | None, frames: int,
    precision: str, names: tuple[str, ...], cpu: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Write the programs of a checkpoint as ONNX graphs that share their weight files, each checked."""
    from sanawm_export.onnx.command import export_checkpoint

    found = _open(source, revision, offline, text_encoder, vae)
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        report = export_checkpoint(found, out, precision=precision, latents=latent_frames(frames), names=names, cpu=cpu, progress=advance)
    if as_json:
        print_json(report)
        return
    table = Table("program", "seconds", "graph kB", "weights")
    for row in report["programs"]:
        table.add_row(row["name"], f"{row['seconds']:.1f}", f"{row['bytes'] / 1e3:,.0f}", row["weights"])
    stdout.print(table)
    stdout.print(f"{report['bytes'] / 1e9:.2f} GB in {out}, {report['seconds']:.0f} s, peak memory {report['peak_rss'] / 2**30:.1f} GiB")


@click.command("build-engine")
@click.option("--checkpoint", "source", help="Path or hf://owner/repo[@revision].")
@_checkpoint_options
@click.option("--synthetic", type=click.IntRange(0), metavar="SEED", help="Instead of --checkpoint: random weights, made when the bundle is opened.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="full", show_default=True, help="Size of a --synthetic model.")
@click.option("--target", "targets", multiple=True, required=True, help="rtx5090, rtx4090, h200, sm_120, cpu, ...; may be repeated.")
@click.option("--engine", help="Engine, where several serve the target; default: the target's first.")
@click.option("--precision", default=None, help="fp32, bf16, or a recipe's name or .toml file; default: the engine's.")
@click.option("--calibration", type=click.Path(path_type=Path), help="File of `sanawm calibrate`; recipes need it, but for cuda's fp8, mixed, nvfp4.")
@click.option("--gdn", type=click.Choice(["plugin", "matmul"]), default="plugin", show_default=True, help="Recurrent blocks in TensorRT engines.")
@click.option("--check", is_flag=True, help="First compare an exported graph with the torch model; at full size this takes minutes.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Bundle to create; of several targets, their folder.")
@click.option("--overwrite", is_flag=True, help="Replace existing bundles.")
@json_option
def build_engine(
    source: str | None, revision: str | None, offline: bool, text_encoder: str | None, vae: str | None, frames: int,
    synthetic: int | None, preset: str, targets: tuple[str, ...], engine: str | None, precision: str | None, calibration: Path | None,
    gdn: str, check: bool, out: Path, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build engine bundles for one or several targets; no GPU is needed."""
    from sanawm_export.build import BUILDERS, BuildRequest, build_bundles
    from sanawm_runtime.summary import bundle_summary, render_bundle
    from sanawm_runtime.targets import resolve_target

    if (source is None) == (synthetic is None):
        raise UserError(f"expected --checkpoint or --synthetic, found {'neither' if source is None else 'both'}; give one")
    places = list({place.name: place for place in map(resolve_target, targets)}.values())
    engines = [_engine(place, engine) for place in places]
    for chosen in engines:
        if calibration is not None and chosen == "onnxruntime":
            raise UserError("the onnxruntime engine is not quantized and reads no --calibration; drop it or choose a GPU target")
        if synthetic is not None and chosen != "cuda":
            raise UserError(f"--synthetic is for the cuda engine, found {chosen}; add --engine cuda, or use `sanawm checkpoint synth`")
    found = _open(source, revision, offline, text_encoder, vae) if source is not None else _synthetic(preset, synthetic)
    requests = [
        (
            BuildRequest(found, place, chosen, precision or BUILDERS[chosen].default_precision, latent_frames(frames), calibration, gdn, check),
            out if len(places) == 1 else out / place.name,
        )
        for place, chosen in zip(places, engines)
    ]
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        bundles = build_bundles(requests, overwrite=overwrite, progress=advance)
    if as_json:
        summaries = [bundle_summary(bundle) for bundle in bundles]
        print_json(summaries[0] if len(summaries) == 1 else {"bundles": summaries})
        return
    for bundle, (_, path) in zip(bundles, requests):
        stdout.print(render_bundle(bundle))
        stderr.print(f"wrote {path}")


def _engine(place: Target, asked: str | None) -> str:
    """The engine to build for a target. Raises UserError."""
    from sanawm_export.build import BUILDERS

    chosen = asked or next((e for e in place.engines if e in BUILDERS), place.engines[0])
    if chosen not in place.engines:
        raise UserError(f"the {chosen} engine does not serve {place.name}; use --engine {' or '.join(place.engines)}")
    if chosen not in BUILDERS:
        raise UserError(f"this version builds {', '.join(BUILDERS)} engines, and {place.name} is served by {chosen}; use --target cpu")
    return chosen


def _synthetic(preset: str, seed: int | None) -> Any:
    from sanawm.config import preset as named
    from sanawm_export.cuda.synthetic import SyntheticCheckpoint

    assert seed is not None
    return SyntheticCheckpoint(named(preset), seed)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(["torch", "onnxruntime"]), default="torch", show_default=True)
@click.option("--tol", default=5e-6, show_default=True, help="Largest absolute error allowed in any tensor.")
@json_option
def parity(file: Path, engine: str, tol: float, as_json: bool) -> None:
    """Run the dense model and the streaming sampler on the recorded vectors of FILE; exit 1 above --tol."""
    from sanawm_export.parity import run_parity

    rows = []
    with stderr.status(f"comparing with {engine}"):
        for row in run_parity(file, engine):
            rows.append(row)
    worst = max((row.error for row in rows), default=0.0)
    passed = bool(rows) and worst <= tol
    if as_json:
        listed = [{"tensor": r.tensor, "max_abs_error": r.error if r.error != float("inf") else None, "max_abs": r.scale} for r in rows]
        print_json({"engine": engine, "tol": tol, "passed": passed, "worst": worst if worst != float("inf") else None, "tensors": listed})
    else:
        table = Table("tensor", "max abs error", "max abs value")
        for r in rows:
            table.add_row(r.tensor, f"{r.error:.2e}", f"{r.scale:.3g}", style="red" if r.error > tol else "")
        stdout.print(table)
        stdout.print(f"{'passed' if passed else 'FAILED'}: worst {worst:.2e}, allowed {tol:g}, {len(rows)} tensors, {engine}")
    if not passed:
        click.get_current_context().exit(1)

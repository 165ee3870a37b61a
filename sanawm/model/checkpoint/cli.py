"""`sanawm checkpoint`: synthesize and inspect."""

from __future__ import annotations

from pathlib import Path

import click

from sanawm.config import PRESETS
from sanawm.console import json_option, print_json, progress, stderr, stdout
from sanawm.errors import UserError


@click.group()
def checkpoint() -> None:
    """Synthesize or inspect checkpoints."""


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True, help="Size of the model.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
@click.option("--layout", type=click.Choice(["streaming", "bidirectional", "diffusers"]), default="streaming", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Default: float32 for tiny, bfloat16 for full.")
@click.option("--no-text", is_flag=True, help="Leave the text encoder out (5 GB at full size).")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@json_option
def synth(
    path: Path | None, preset: str, seed: int, layout: str, dtype: str | None, no_text: bool, overwrite: bool, as_json: bool
) -> None:
    """Write a random checkpoint in the official layout to PATH.

    Without PATH, --json prints the transformer's expected tensor names and shapes and writes nothing.
    """
    from sanawm.model.checkpoint.inspect import expected, inspect_checkpoint
    from sanawm.model.checkpoint.synth import synthesize

    if path is None:
        if not as_json:
            raise UserError("expected a PATH to write the checkpoint to, found none; give one, or --json to print names and shapes alone")
        print_json(expected(preset))
        return
    with progress() as bar:
        task = bar.add_task(f"writing {path}", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done >> 20, total=total >> 20)

        options = {"seed": seed, "layout": layout, "dtype": dtype, "text": not no_text, "overwrite": overwrite}
        synthesize(path, preset, progress=advance, **options)  # type: ignore[arg-type]
    if as_json:
        print_json(inspect_checkpoint(path))
    else:
        stderr.print(f"wrote {path}")


@checkpoint.command()
@click.argument("source", required=False)
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Show what a preset's transformer must hold instead of reading SOURCE.")
@click.option("--revision", help="Hub revision; may also follow the address as @revision.")
@click.option("--offline", is_flag=True, help="Use only what is in the local hub cache.")
@click.option("--text-encoder", help="Folder or hub address of the Gemma-2 text encoder.")
@click.option("--vae", help="Folder or hub address of the VAE.")
@json_option
def inspect(
    source: str | None, preset: str | None, revision: str | None, offline: bool, text_encoder: str | None, vae: str | None, as_json: bool
) -> None:
    """Say what the checkpoint at SOURCE is (a path or hf://owner/repo[@revision]) and what differs from what it should be."""
    from sanawm.model.checkpoint.inspect import expected, inspect_checkpoint
    from sanawm.model.checkpoint.report import render_expected, render_inspection

    if (source is None) == (preset is None):
        raise UserError("expected either SOURCE or --preset; give one of them")
    if preset is not None:
        wanted = expected(preset)
        print_json(wanted) if as_json else stdout.print(render_expected(preset, wanted))
        return
    assert source is not None
    report = inspect_checkpoint(source, revision=revision, offline=offline, text_encoder=text_encoder, vae=vae)
    print_json(report) if as_json else stdout.print(render_inspection(report))
    if not report["ok"]:
        click.get_current_context().exit(1)

"""`sanawm demo`: the whole path from checkpoint to video on a CPU, through the same commands a user types."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from sanawm.cli import invoke
from sanawm.console import stderr, stdout

ACTION = "w-48,dw-48,w-24,aw-48,iw-12,kw-12"
PROMPT = "A first-person walk across an open plain under a clear sky."


def _call(*arguments: str) -> None:
    stderr.print(f"[bold]sanawm {' '.join(arguments)}[/bold]")
    invoke(list(arguments))


@click.command()
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--frames", default=193, show_default=True, help="Pixel frames, 24k + 1.")
@click.option("--action", default=ACTION, show_default=True, help="Held keys and frames.")
@click.option("--seed", default=42, show_default=True)
def demo(out: Path, frames: int, action: str, seed: int) -> None:
    """Build the tiny world's bundle and stream a clip from it."""
    out.mkdir(parents=True, exist_ok=True)
    assets = resources.files("sanawm") / "assets"
    with resources.as_file(assets) as folder:
        checkpoint, image = folder / "tiny_world", folder / "first_frames" / "plain.png"
        stages = {}
        begin = time.perf_counter()
        _call("checkpoint", "inspect", str(checkpoint))
        stages["inspect"], begin = time.perf_counter() - begin, time.perf_counter()
        bundle = out / "bundle"
        _call("build-engine", "--checkpoint", str(checkpoint), "--target", "cpu", "-o", str(bundle), "--overwrite")
        stages["build-engine"], begin = time.perf_counter() - begin, time.perf_counter()
        _call("verify", str(bundle))
        stages["verify"], begin = time.perf_counter() - begin, time.perf_counter()
        video = out / "clip.mp4"
        clip = ["--image", str(image), "--prompt", PROMPT, "--action", action, "--frames", str(frames), "--seed", str(seed)]
        _call("run", str(bundle), *clip, "-o", str(video), "--pictures")
        stages["run"] = time.perf_counter() - begin
    timing: dict[str, Any] = json.loads((out / "clip.timing.json").read_text())
    table = Table("stage", "seconds", title="demo")
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.1f}")
    stdout.print(table)
    stdout.print(
        f"{timing['frames']} frames at {timing['fps']} frames a second; first frames after {timing['first_frame_s']:.1f} s. Look at\n"
        + "\n".join(f"  {path}" for path in timing["outputs"])
    )

"""`sanawm run`, `inspect` and `verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import click
from rich.table import Table

from sanawm.console import json_option, print_json, progress, stderr, stdout
from sanawm.errors import InputError
from sanawm_runtime.signals import orderly_termination


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", required=True, help="First frame: PNG, JPEG, WebP or BMP; resized and cropped to the model's frame.")
@click.option("--prompt", help="What the world is.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Text file with the prompt.")
@click.option("--camera", help="Camera path: .npy, .json or .txt camera-to-world matrices (F, 4, 4), OpenCV axes.")
@click.option("--action", help="Held keys and frames, such as 'w-48,dw-24,none-24'; a scheme may lead: 'official-2026-05: w-48'.")
@click.option("--intrinsics", help="'fx,fy,cx,cy' or a file with (4,), (3,3), (F,4) or (F,3,3), in pixels of the image.")
@click.option("--fov", type=float, help="Horizontal field of view in degrees, without --intrinsics.")
@click.option("--frames", type=int, help="Pixel frames, 24k + 1; default: as far as the camera path reaches.")
@click.option("--seed", default=42, show_default=True, help="Same seed, same video.")
@click.option("-o", "--output", "outputs", multiple=True, required=True, help=".mp4, .npy (latents) or a directory (PNGs); may be repeated.")
@click.option("--codec", type=click.Choice(["auto", "libx264", "h264_nvenc"]), default="auto", show_default=True)
@click.option("--timing", type=click.Path(path_type=Path), help="Timing JSON; default: beside the first output.")
@click.option("--pictures", is_flag=True, help="Also write a contact sheet, the camera path and a timeline as PNGs.")
@click.option("--threads", type=int, help="CPU threads; default: all cores.")
@click.option("--at-end", type=click.Choice(["stop", "continue"]), default="stop", show_default=True, help="After 8185 frames.")
@click.option(
    "--trusted-key", "trusted", multiple=True, type=click.Path(path_type=Path), envvar="SANAWM_TRUSTED_KEYS", show_envvar=True,
    help="Public key that must have signed BUNDLE; with several, one of them.",
)  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps encoded prompts between runs.")
@click.option("--free-encoders", is_flag=True, help="Give back the encoders' memory once they have run.")
@json_option
def run(
    bundle: Path, image: str, prompt: str | None, prompt_file: Path | None, camera: str | None, action: str | None, intrinsics: str | None,
    fov: float | None, frames: int | None, seed: int, outputs: tuple[str, ...], codec: str, timing: Path | None, pictures: bool,
    threads: int | None, at_end: Literal["stop", "continue"], trusted: tuple[Path, ...], cache: Path | None,
    free_encoders: bool, as_json: bool,
) -> None:  # fmt: skip
    """Stream a clip from BUNDLE, chunk by chunk; an mp4 can be watched while it grows."""
    from sanawm_runtime.clip import ClipRequest, generate_clip, write_json, write_pictures
    from sanawm_runtime.world import World

    request = ClipRequest(image, _prompt(prompt, prompt_file), camera, action, intrinsics, fov, frames, seed, codec, at_end)
    begin = time.perf_counter()
    opened_world = World.open(bundle, threads=threads, trusted_keys=trusted or None, free_encoders=free_encoders, cache=cache)
    with orderly_termination(), opened_world as world, progress() as bar:
        task = bar.add_task("starting", total=None)

        def advance(done: int, total: int, chunk: Any) -> None:
            seconds = sum(chunk.seconds.values())
            text = f"chunk {done}/{total}  {len(chunk.frames)} frames in {seconds:.2f} s"
            bar.update(task, description=text, completed=done, total=total)

        opened = time.perf_counter() - begin
        report, shown, path, rows = generate_clip(world, request, outputs, opened_s=opened, progress=advance)
        stem = Path(outputs[0])
        stem = stem.with_suffix("") if stem.suffix else stem
        written = write_pictures(stem, report, shown, path, rows, world) if pictures else []
    report.outputs += map(str, written)
    timing = timing or stem.with_name(f"{stem.name}.timing.json")
    write_json(timing, report.to_json())
    if as_json:
        print_json(report.to_json() | {"timing": str(timing)})
        return
    table = Table("stage", "median s", "total s")
    for name in report.chunks[0]["stages"]:
        values = sorted(c["stages"][name] for c in report.chunks)
        table.add_row(name, f"{values[len(values) // 2]:.3f}", f"{sum(values):.2f}")
    stdout.print(table)
    stdout.print(
        f"{report.frames} frames ({report.frames / report.fps:.1f} s of video) in {report.total_s:.1f} s, "
        f"first frames after {report.first_frame_s:.2f} s: {', '.join([*report.outputs, str(timing)])}"
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InputError("expected a prompt, either --prompt or --prompt-file; give one of them")
    if prompt is not None:
        return prompt
    assert file is not None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompt from {file} ({error}); give a UTF-8 text file") from error


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE is: target, programs, precision, versions, and what nobody has run."""
    from sanawm_runtime.bundle import Bundle
    from sanawm_runtime.summary import bundle_summary, render_bundle

    opened = Bundle.open(bundle)
    print_json(bundle_summary(opened)) if as_json else stdout.print(render_bundle(opened))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Hash every file of BUNDLE; exit 1 if one differs from the manifest or is missing."""
    from sanawm_runtime.bundle import Bundle

    opened = Bundle.open(bundle, verify="manifest")
    with progress() as bar:
        task = bar.add_task("hashing", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done >> 20, total=total >> 20)

        report = opened.verify(advance)
    if as_json:
        files = [{"path": f.path, "state": f.state, "detail": f.detail} for f in report.files]
        print_json({"ok": report.ok, "digest": opened.digest, "files": files})
    else:
        for f in report.files:
            if f.state != "ok":
                stdout.print(f"[red]{f.state}[/red] {f.path}: {f.detail}")
        good = len(report.by_state("ok"))
        stderr.print(f"{'ok' if report.ok else 'FAILED'}: {good} of {len(opened.manifest.files)} files match the manifest")
    if not report.ok:
        click.get_current_context().exit(1)

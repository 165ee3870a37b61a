"""Pictures of a run: contact sheet, camera path, timeline. Drawn with Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sanawm.errors import InputError
from sanawm_runtime.camera_plot import camera_path_plot
from sanawm_runtime.canvas import GRID, INK, MUTED, RULE, Canvas, Colour, nice_step, number, text_width

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["camera_path_plot", "contact_sheet", "save_picture", "timeline_plot"]

_MARGIN = 28.0
_STAGE_COLOURS: dict[str, Colour] = {
    "denoise": (46, 92, 158),
    "commit": (122, 166, 210),
    "decode": (226, 140, 52),
    "write": (150, 158, 170),
    "camera": (86, 150, 126),
}
# For stages without a colour of their own, in order of appearance.
_MORE_COLOURS: tuple[Colour, ...] = ((140, 104, 170), (190, 92, 96), (110, 128, 72), (70, 120, 140))
# Above this, bars are thinner than the gaps between them, and neighbours are drawn as their mean.
_MOST_BARS = 240


def contact_sheet(frames: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None, title: str = "") -> Image:
    """Frames side by side with a caption under each.

    frames: (H, W, 3) uint8 RGB, all of one size. captions: as many as frames. Returns an RGB picture about 1840 pixels wide. Raises
    ValueError for frames that do not fit together.
    """
    from PIL import Image as pil

    if not frames or columns < 1 or (captions is not None and len(captions) != len(frames)):
        raise ValueError(f"expected frames, at least one column and one caption a frame; found {len(frames)} frames, {columns} columns")
    shapes = {(frame.shape, str(frame.dtype)) for frame in frames}
    if len(shapes) != 1 or frames[0].ndim != 3 or frames[0].shape[2] != 3 or frames[0].dtype != np.uint8:
        raise ValueError(f"expected frames of one shape (H, W, 3) and dtype uint8, found {sorted(map(str, shapes))}")
    columns = min(columns, len(frames))
    gap, line = 12.0, 24.0 if captions else 0.0
    across = (920.0 - 2 * _MARGIN - (columns - 1) * gap) / columns
    down = across * frames[0].shape[0] / frames[0].shape[1]
    rows = math.ceil(len(frames) / columns)
    top = _MARGIN + (30.0 if title else 0.0)
    canvas = Canvas(920.0, top + rows * (down + line) + (rows - 1) * gap + _MARGIN - (8.0 if captions else 0.0))
    if title:
        canvas.text((_MARGIN, _MARGIN + 12), title, 17)
    for index, frame in enumerate(frames):
        left = _MARGIN + index % columns * (across + gap)
        upper = top + index // columns * (down + line + gap)
        canvas.picture(pil.fromarray(frame), left, upper, across, down, radius=5)
        if captions:
            canvas.text((left + 1, upper + down + 16), captions[index], 11.5, MUTED)
    return canvas.finish()


def timeline_plot(timing: dict[str, Any], title: str = "Time per chunk") -> Image:
    """Stacked bars of the seconds each chunk spent in each stage, under the line of real time.

    timing: {"fps": frames a second, "chunks": [{"frames": pixel frames, "stages": {name: seconds}}, …], "first_frame_s": seconds}, the last
    optional. Stages are stacked in order of appearance. The line is what a chunk may take to keep up with its own playback, frames / fps.
    Raises ValueError for a timing without chunks.
    """
    chunks, fps = timing["chunks"], float(timing["fps"])
    if not chunks:
        raise ValueError("expected a timing with at least one chunk, found none")
    stages = list(dict.fromkeys(name for chunk in chunks for name in chunk["stages"]))
    seconds = np.array([[float(chunk["stages"].get(name, 0.0)) for name in stages] for chunk in chunks])
    playback = np.array([chunk["frames"] / fps for chunk in chunks])
    facts = _timing_facts(seconds.sum(1), playback, timing.get("first_frame_s"))

    group = math.ceil(len(chunks) / _MOST_BARS)
    bars = [slice(start, start + group) for start in range(0, len(chunks), group)]
    heights = np.array([seconds[bar].mean(0) for bar in bars])
    limits = np.array([playback[bar].mean() for bar in bars])

    canvas = Canvas(920.0, 400.0)
    left, right, upper, lower = 72.0, 920.0 - _MARGIN, 108.0, 346.0
    canvas.text((_MARGIN, _MARGIN + 12), title, 17)
    canvas.text((_MARGIN, _MARGIN + 33), facts, 12, MUTED)
    colours = _stage_colours(stages)
    _legend(canvas, stages, colours, right)

    top = 1.06 * max(float(heights.sum(1).max()), float(limits.max()), 1e-6)
    step = nice_step(top, 5)
    for tick in range(int(top / step) + 1):
        y = lower - tick * step / top * (lower - upper)
        canvas.line([(left, y), (right, y)], GRID if tick else RULE, 0.75)
        canvas.text((left - 10, y), number(tick * step, step), 11, MUTED, "rm")
    canvas.text((_MARGIN, upper - 10), "seconds", 11, MUTED)

    pitch = (right - left) / len(bars)
    # One bar alone would be a wall, and hundreds have no room for gaps.
    thickness = min(pitch * (0.72 if pitch > 4 else 1.0), 64.0)
    for index, parts in enumerate(heights):
        middle, floor = left + (index + 0.5) * pitch, lower
        for name, part in zip(stages, parts):
            ceiling = floor - part / top * (lower - upper)
            canvas.box(middle - thickness / 2, ceiling, middle + thickness / 2, floor, colours[name])
            floor = ceiling
    _real_time(canvas, limits, left, pitch, lower, (lower - upper) / top)

    every = max(1, int(nice_step(len(chunks), 12)))
    for chunk in range(0, len(chunks), every):
        canvas.text((left + (chunk / group + 0.5) * pitch, lower + 9), str(chunk), 11, MUTED, "ma")
    label = "chunk" if group == 1 else f"chunk (each bar is the mean of {group})"
    canvas.text(((left + right) / 2, lower + 28), label, 11, MUTED, "ma")
    return canvas.finish()


def _timing_facts(total: np.ndarray, playback: np.ndarray, first_frame: float | None) -> str:
    # The first chunks have other shapes and warm caches up; the median of the rest is what a stream settles to.
    settled = slice(2, None) if len(total) > 3 else slice(None)
    pace = float(np.median(playback[settled] / np.maximum(total[settled], 1e-9)))
    facts = [
        f"{len(total)} chunk{'s' * (len(total) != 1)}",
        f"{playback.sum():.1f} s of video in {total.sum():.1f} s",
        f"median {np.median(total[settled]):.2f} s a chunk, {pace:.3g}x real time",
    ]
    if first_frame is not None:
        facts.append(f"first frame after {first_frame:.2f} s")
    return "   \u00b7   ".join(facts)


def _stage_colours(stages: list[str]) -> dict[str, Colour]:
    more = iter(_MORE_COLOURS * len(stages))
    return {name: _STAGE_COLOURS[name] if name in _STAGE_COLOURS else next(more) for name in stages}


def _legend(canvas: Canvas, stages: list[str], colours: dict[str, Colour], right: float) -> None:
    x = right
    baseline = _MARGIN + 12
    for name in reversed(["real time", *stages]):
        x -= text_width(name, 12)
        canvas.text((x, baseline), name, 12, INK)
        x -= 18
        if name in colours:
            canvas.box(x, baseline - 10, x + 12, baseline + 1, colours[name], radius=2.5)
        else:
            canvas.dashes((x - 6, baseline - 4), (x + 12, baseline - 4), INK, 1.5)
        x -= 18


def _real_time(canvas: Canvas, limits: np.ndarray, left: float, pitch: float, lower: float, scale: float) -> None:
    start = 0
    for index in range(1, len(limits) + 1):
        if index == len(limits) or not math.isclose(limits[index], limits[start]):
            y = lower - limits[start] * scale
            ends = (left + start * pitch, y), (left + index * pitch, y)
            canvas.line(ends, (255, 255, 255, 170), 3.5)  # so that the dashes show on dark bars
            canvas.dashes(*ends, INK, 1.5)
            start = index


def save_picture(image: Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, whole or not at all. Raises InputError for a place that cannot be written."""
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}; free space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)

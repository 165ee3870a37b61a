"""The camera path drawn from above, with height and pitch over time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sanawm_runtime.canvas import GRID, INK, MUTED, PANEL, PAPER, RULE, Canvas, Colour, nice_step, number, text_width

if TYPE_CHECKING:
    from PIL.Image import Image

# Shape letters: F pixel frames. Camera axes are OpenCV's: x right, y down, z forward.

_WIDTH = 920.0
_LEFT, _RIGHT = 72.0, _WIDTH - 28.0
_MAP_TOP, _MAP_BOTTOM = 82.0, 542.0
_MOST_POINTS = 1600
_STRIP_HEIGHT, _STRIP_GAP = 62.0, 30.0
# Time runs from blue over magenta to orange: lightness rises throughout, so the order survives a grey print.
_STOPS = np.array([[43, 76, 155], [176, 70, 150], [240, 145, 50]], np.float64)


def camera_path_plot(
    c2w: np.ndarray, intrinsics: np.ndarray, fps: float = 16.0, image_width: float | None = None, title: str = "Camera path"
) -> Image:
    """The path seen from above, x to the right and z (forward) up, with the field of view at some frames; height and pitch below.

    c2w: (F, 4, 4) camera-to-world, OpenCV axes. intrinsics: (4,) or (F, 4), fx fy cx cy in pixels of an image `image_width` wide (None: the
    principal point is its middle). Distances are in the path's own units. Returns an RGB picture 1840 pixels wide. Raises ValueError for
    other shapes or values that are not finite.
    """
    c2w = np.asarray(c2w, np.float64)
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w) or not np.isfinite(c2w).all():
        raise ValueError(f"expected finite camera-to-world matrices of shape (F, 4, 4), found {c2w.shape}")
    intrinsics = np.asarray(intrinsics, np.float64)
    if intrinsics.shape not in ((4,), (len(c2w), 4)) or not np.isfinite(intrinsics).all() or (intrinsics[..., 0] <= 0).any():
        raise ValueError(f"expected intrinsics fx fy cx cy of shape (4,) or ({len(c2w)}, 4), found {intrinsics.shape}")
    fx, _, cx, _ = np.broadcast_to(intrinsics, (len(c2w), 4)).T
    half_view = np.arctan((cx if image_width is None else image_width / 2) / fx)

    canvas = Canvas(_WIDTH, _MAP_BOTTOM + 2 * (_STRIP_HEIGHT + _STRIP_GAP) + 62)
    canvas.text((28, 40), title, 17)
    canvas.text((28, 61), _facts(c2w, half_view, fps), 12, MUTED)
    # More points than the picture has columns add time and no detail.
    shown = np.unique(np.linspace(0, len(c2w) - 1, min(len(c2w), _MOST_POINTS)).round().astype(int))
    c2w, half_view = c2w[shown], half_view[shown]
    _map(canvas, c2w, half_view)
    # y points down and z forward: up is -y, and looking up gives z a negative y.
    height = -c2w[:, 1, 3]
    pitch = np.degrees(np.arcsin(np.clip(-c2w[:, 1, 2], -1, 1)))
    top = _MAP_BOTTOM + 48
    seconds = shown / fps
    _strip(canvas, top, "height, units above the start", height - height[0], seconds, least=0.2)
    _strip(canvas, top + _STRIP_HEIGHT + _STRIP_GAP, "pitch, degrees above the horizon", pitch, seconds, least=10.0)
    _time_axis(canvas, top + 2 * _STRIP_HEIGHT + _STRIP_GAP, seconds)
    return canvas.finish()


def _facts(c2w: np.ndarray, half_view: np.ndarray, fps: float) -> str:
    steps = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    # Angle between the viewing directions of neighbouring frames, from the chord, which stays accurate where arccos does not.
    turns = 2 * np.arcsin(np.clip(np.linalg.norm(np.diff(c2w[:, :3, 2], axis=0), axis=1) / 2, 0, 1))
    facts = [
        f"{len(c2w)} frames, {len(c2w) / fps:.1f} s at {fps:g} fps",
        f"path {steps.sum():.3g} units",
        f"turned {math.degrees(turns.sum()):.0f}\u00b0 in all",
        f"horizontal field of view {math.degrees(2 * half_view[0]):.0f}\u00b0",
    ]
    return "   \u00b7   ".join(facts)


def _colour(share: float, alpha: int = 255) -> Colour:
    position = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(position), len(_STOPS) - 2)
    red, green, blue = (_STOPS[index] + (_STOPS[index + 1] - _STOPS[index]) * (position - index)).round().astype(int)
    return int(red), int(green), int(blue), alpha


def _map(canvas: Canvas, c2w: np.ndarray, half_view: np.ndarray) -> None:
    x, z = c2w[:, 0, 3], c2w[:, 2, 3]
    width, depth = _RIGHT - _LEFT, _MAP_BOTTOM - _MAP_TOP
    # One scale for both axes. The path gets the middle; the rim is for the fields of view. A camera that stays gets a unit around it.
    per_unit = min(0.80 * width / max(np.ptp(x), 1e-9), 0.74 * depth / max(np.ptp(z), 1e-9), 0.5 * depth)
    middle = ((x.min() + x.max()) / 2, (z.min() + z.max()) / 2)

    def place(east: float, north: float) -> tuple[float, float]:
        return (_LEFT + _RIGHT) / 2 + (east - middle[0]) * per_unit, (_MAP_TOP + _MAP_BOTTOM) / 2 - (north - middle[1]) * per_unit

    canvas.box(_LEFT, _MAP_TOP, _RIGHT, _MAP_BOTTOM, PANEL, radius=6)
    step = nice_step(width / per_unit, 12)
    for tick in range(math.ceil((middle[0] - width / per_unit / 2) / step), math.floor((middle[0] + width / per_unit / 2) / step) + 1):
        at = place(tick * step, 0)[0]
        canvas.line([(at, _MAP_TOP), (at, _MAP_BOTTOM)], RULE if tick == 0 else GRID, 0.75)
        canvas.text((at, _MAP_BOTTOM + 8), number(tick * step, step), 11, MUTED, "ma")
    for tick in range(math.ceil((middle[1] - depth / per_unit / 2) / step), math.floor((middle[1] + depth / per_unit / 2) / step) + 1):
        at = place(0, tick * step)[1]
        canvas.line([(_LEFT, at), (_RIGHT, at)], RULE if tick == 0 else GRID, 0.75)
        canvas.text((_LEFT - 10, at), number(tick * step, step), 11, MUTED, "rm")
    _compass(canvas)

    last = len(c2w) - 1
    forward = c2w[:, :3, 2]
    # A path that is a point in the picture has room for larger ones.
    reach = 30.0 if max(np.ptp(x), np.ptp(z)) * per_unit > 60 else 90.0
    for frame in _spread(np.stack([x, z], 1) * per_unit, forward):
        _field_of_view(canvas, place(x[frame], z[frame]), forward[frame], half_view[frame], frame / max(last, 1), reach)
    track = [place(east, north) for east, north in zip(x, z)]
    for frame in range(last):
        canvas.line(track[frame : frame + 2], _colour(frame / last), 2.6)
    start, end = track[0], track[-1]
    canvas.circle(start, 5.5, PAPER, _colour(0), 2.4)
    canvas.circle(end, 5.5, _colour(1), PAPER, 1.2)
    if math.dist(start, end) > 30:
        _label(canvas, "start", start, forward[0], track)
        _label(canvas, "end", end, forward[-1], track)
    else:
        _label(canvas, "start, end", start, forward.mean(0), track)


def _compass(canvas: Canvas) -> None:
    corner_x, corner_y = _LEFT + 18, _MAP_BOTTOM - 18
    canvas.arrow((corner_x, corner_y), (corner_x, corner_y - 30), MUTED)
    canvas.arrow((corner_x, corner_y), (corner_x + 30, corner_y), MUTED)
    canvas.text((corner_x + 7, corner_y - 24), "z, forward", 11, MUTED, "lm")
    canvas.text((corner_x + 36, corner_y), "x, right", 11, MUTED, "lm")


def _label(canvas: Canvas, word: str, at: tuple[float, float], forward: np.ndarray, track: list[tuple[float, float]]) -> None:
    """A word beside a marker, where it hides the least of the path, and then on the side the camera looks away from."""
    half = text_width(word, 12) / 2
    points = np.array(track)

    def cost(side: tuple[int, int]) -> tuple[int, float]:
        x, y = at[0] + side[0] * (half + 14), at[1] + side[1] * 21
        inside = (np.abs(points[:, 0] - x) < half + 5) & (np.abs(points[:, 1] - y) < 10)
        outside = x - half < _LEFT or x + half > _RIGHT
        return len(track) * outside + int(inside.sum()), side[0] * forward[0] - side[1] * forward[2]

    side = min(((1, 0), (-1, 0), (0, 1), (0, -1)), key=cost)
    x, y = at[0] + side[0] * (half + 14), at[1] + side[1] * 21
    canvas.box(x - half - 5, y - 9, x + half + 5, y + 9, (255, 255, 255, 215), radius=4)
    canvas.text((x, y), word, 12, INK, "mm")


def _spread(track: np.ndarray, forward: np.ndarray) -> list[int]:
    """Frames at which to draw the field of view: even steps along what moves or turns, a step being 46 units of the picture or 18 degrees.

    track: (F, 2) positions in the picture. forward: (F, 3) unit viewing directions.
    """
    moved = np.linalg.norm(np.diff(track, axis=0), axis=1) / 46
    turned = np.linalg.norm(np.diff(forward, axis=0), axis=1) / math.radians(18)
    distance = np.concatenate([[0.0], np.cumsum(np.maximum(moved, turned))])
    count = min(int(distance[-1]) + 1, 48)
    return sorted({int(np.searchsorted(distance, share * distance[-1])) for share in np.linspace(0, 1, count + 1)})


def _field_of_view(
    canvas: Canvas, apex: tuple[float, float], forward: np.ndarray, half_view: float, share: float, reach: float
) -> None:
    heading = math.atan2(forward[0], forward[2])
    # Seen from above, a camera that looks up or down covers less ground.
    reach *= max(math.hypot(forward[0], forward[2]), 0.15)
    side = reach / math.cos(half_view) if half_view < 1.2 else reach
    corners = [(apex[0] + side * math.sin(heading + turn), apex[1] - side * math.cos(heading + turn)) for turn in (-half_view, half_view)]
    canvas.polygon([apex, *corners], _colour(share, 46))
    for corner in corners:
        canvas.line([apex, corner], _colour(share, 150), 0.9)


def _strip(canvas: Canvas, top: float, name: str, values: np.ndarray, seconds: np.ndarray, least: float) -> None:
    bottom = top + _STRIP_HEIGHT
    low, high = float(values.min()), float(values.max())
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    rim = 0.12 * (high - low)
    low, high = low - rim, high + rim
    canvas.box(_LEFT, top, _RIGHT, bottom, PANEL, radius=6)
    step = nice_step(high - low, 4)
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = bottom - (tick * step - low) / (high - low) * _STRIP_HEIGHT
        canvas.line([(_LEFT, y), (_RIGHT, y)], RULE if tick == 0 else GRID, 0.75)
        canvas.text((_LEFT - 10, y), number(tick * step, step), 11, MUTED, "rm")
    canvas.text((_LEFT, top - 7), name, 11.5, INK)
    span = max(float(seconds[-1]), 1e-9)
    points = [
        (_LEFT + (_RIGHT - _LEFT) * second / span, bottom - (value - low) / (high - low) * _STRIP_HEIGHT)
        for second, value in zip(seconds, values)
    ]
    if len(points) == 1:
        canvas.circle(points[0], 2.5, _colour(0))
    for index in range(len(points) - 1):
        canvas.line(points[index : index + 2], _colour(index / (len(points) - 1)), 2.0)


def _time_axis(canvas: Canvas, y: float, seconds: np.ndarray) -> None:
    span = float(seconds[-1])
    step = nice_step(span, 12) if span else 1.0
    for tick in range(int(span / step + 1e-9) + 1):
        at = _LEFT + (_RIGHT - _LEFT) * (tick * step / span if span else 0.0)
        canvas.text((at, y + 8), number(tick * step, step), 11, MUTED, "ma")
    canvas.text(((_LEFT + _RIGHT) / 2, y + 26), "seconds", 11, MUTED, "ma")

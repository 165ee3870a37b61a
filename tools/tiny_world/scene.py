"""Procedural open-air scenes, ray-cast with numpy.

A scene is a tiled plain with pillars under a sky with a sun, hills on the horizon. World axes are those of the first camera (OpenCV: +x right,
+y down, +z forward), which stands level at the origin; the ground is the plane y = EYE_HEIGHT. H, W are pixel rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

EYE_HEIGHT = 0.6
TILE = 0.9
HAZE_DISTANCE = 14.0
NEAR = 0.05


@dataclass(frozen=True)
class Palette:
    """Colours of a kind of scene, RGB in [0, 1]."""

    prompt: str
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    hills: tuple[float, float, float]
    light_tile: tuple[float, float, float]
    dark_tile: tuple[float, float, float]
    sun: tuple[float, float, float]


PALETTES = {
    "plain": Palette(
        "A first-person walk across an open green plain with coloured pillars under a clear sky.",
        (0.22, 0.46, 0.86), (0.78, 0.88, 0.96), (0.36, 0.50, 0.52), (0.52, 0.70, 0.30), (0.30, 0.52, 0.22), (1.0, 0.97, 0.85),
    ),
    "desert": Palette(
        "A first-person walk across a sunlit desert with coloured pillars and far dunes.",
        (0.30, 0.58, 0.80), (0.98, 0.88, 0.70), (0.72, 0.48, 0.34), (0.93, 0.76, 0.50), (0.76, 0.54, 0.32), (1.0, 0.98, 0.88),
    ),
    "dusk": Palette(
        "A first-person walk across a dark plain with coloured pillars at dusk, the sun low over violet hills.",
        (0.13, 0.12, 0.34), (0.96, 0.54, 0.36), (0.26, 0.16, 0.32), (0.36, 0.30, 0.42), (0.20, 0.17, 0.28), (1.0, 0.86, 0.60),
    ),
}  # fmt: skip
PILLAR_COLOURS = ((0.86, 0.22, 0.18), (0.16, 0.36, 0.84), (0.96, 0.78, 0.16), (0.92, 0.90, 0.88), (0.56, 0.22, 0.66), (0.10, 0.62, 0.62))


@dataclass(frozen=True)
class Scene:
    """One world: everything that a view of it depends on besides the camera."""

    palette: Palette
    sun: Array  # unit direction (3,)
    hills: Array  # (waves, 3): waves around the horizon, amplitude in radians, phase
    tile_shift: Array  # (2,)
    low: Array  # (pillars, 3) lower corners, x y z
    high: Array  # (pillars, 3)
    colours: Array  # (pillars, 3)


def random_scene(rng: np.random.Generator, kind: str | None = None, path: NDArray[np.floating] | None = None, pillars: int = 14) -> Scene:
    """A scene of that kind (any if None); pillars that `path` (F, 4, 4) would touch are left out."""
    palette = PALETTES[kind or rng.choice(list(PALETTES))]
    azimuth, height = rng.uniform(-math.pi, math.pi), rng.uniform(0.12, 0.45) if palette is not PALETTES["dusk"] else rng.uniform(0.05, 0.15)
    sun = np.array([math.sin(azimuth) * math.cos(height), -math.sin(height), math.cos(azimuth) * math.cos(height)], np.float32)
    waves = np.array([[n, rng.uniform(0.2, 1.0) * 0.05 / math.sqrt(n), rng.uniform(0, 2 * math.pi)] for n in (2, 3, 5, 8)], np.float32)
    walked = np.zeros((1, 2)) if path is None else np.asarray(path)[::4, :3, 3][:, [0, 2]]
    boxes: list[tuple[list[float], list[float], tuple[float, float, float]]] = []
    for _ in range(40 * pillars):
        if len(boxes) == pillars:
            break
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(1.6, 8.0)
        x, z = distance * math.sin(angle), distance * math.cos(angle)
        half, tall = rng.uniform(0.15, 0.4), rng.uniform(0.5, 1.7)
        colour = PILLAR_COLOURS[rng.integers(len(PILLAR_COLOURS))]
        apart = all(max(abs(x - (a[0] + b[0]) / 2), abs(z - (a[2] + b[2]) / 2)) > 1.2 for a, b, _ in boxes)
        if apart and np.min(np.abs(walked - [x, z]).max(axis=1)) > half + 0.45:
            boxes.append(([x - half, EYE_HEIGHT - tall, z - half], [x + half, EYE_HEIGHT, z + half], colour))
    low, high, colours = (np.array([box[i] for box in boxes], np.float32).reshape(-1, 3) for i in range(3))
    return Scene(palette, sun, waves, rng.uniform(0, 2 * TILE, 2).astype(np.float32), low, high, colours)


def render(scene: Scene, c2w: NDArray[np.floating], intrinsics: NDArray[np.floating], height: int, width: int, samples: int = 1) -> NDArray[np.uint8]:
    """A view of the scene, (H, W, 3) uint8 RGB.

    c2w (4, 4) camera-to-world; intrinsics (4,) fx fy cx cy in pixels, the centre of pixel i at i + 0.5; `samples` squared rays a pixel.
    """
    fx, fy, cx, cy = (float(value) * samples for value in intrinsics)
    rows, columns = height * samples, width * samples
    local = np.ones((rows, columns, 3), np.float32)
    local[..., 0] = (np.arange(columns, dtype=np.float32) + 0.5 - cx) / fx
    local[..., 1] = ((np.arange(rows, dtype=np.float32) + 0.5 - cy) / fy)[:, None]
    rotation, origin = np.asarray(c2w[:3, :3], np.float32), np.asarray(c2w[:3, 3], np.float32)
    rays = local @ rotation.T
    image, depth = _backdrop(scene, rays, origin, 1 / fx)
    _pillars(scene, image, depth, rays, origin, rotation, (fx, fy, cx, cy))
    image = image.reshape(height, samples, width, samples, 3).mean(axis=(1, 3)) if samples > 1 else image
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def render_clip(scene: Scene, path: NDArray[np.floating], intrinsics: NDArray[np.floating], height: int, width: int) -> NDArray[np.uint8]:
    """Views along a path (F, 4, 4), (F, H, W, 3) uint8."""
    return np.stack([render(scene, pose, intrinsics, height, width) for pose in path])


def _backdrop(scene: Scene, rays: Array, origin: Array, pixel: float) -> tuple[Array, Array]:
    """Sky, hills and ground, (H, W, 3), and the distance along each ray at which the ground is met."""
    palette = scene.palette
    zenith, horizon, hills, light, dark, sun_colour = (
        np.array(c, np.float32) for c in (palette.zenith, palette.horizon, palette.hills, palette.light_tile, palette.dark_tile, palette.sun)
    )
    image, depth = np.empty_like(rays), np.full(rays.shape[:2], np.inf, np.float32)
    down = rays[..., 1] > 1e-4
    sky = rays[~down]
    sky = sky / np.linalg.norm(sky, axis=-1, keepdims=True)
    up = np.maximum(-sky[:, 1], 0)
    colour = horizon + (zenith - horizon) * np.minimum(up / 0.55, 1)[:, None] ** np.float32(0.7)
    toward = sky @ scene.sun
    glow = 0.55 * np.exp(30 * (toward - 1)) + np.clip((toward - 0.9945) / 0.0015, 0, 1)
    colour += np.minimum(glow, 1)[:, None] * (sun_colour - colour)
    azimuth = np.arctan2(sky[:, 0], sky[:, 2])
    ridge = np.float32(0.045) + sum(amplitude * np.sin(n * azimuth + phase) for n, amplitude, phase in scene.hills)
    covered = np.clip((np.maximum(ridge, 0.004) - up) / 0.006 + 0.5, 0, 1)
    # Hills pale toward their feet.
    foot = np.clip(up / 0.1, 0, 1)[:, None]
    colour += covered[:, None] * (hills + (1 - foot) * 0.35 * (horizon - hills) - colour)
    image[~down] = colour

    ground = rays[down]
    t = (EYE_HEIGHT - origin[1]) / ground[:, 1]
    x, z = (origin[axis] + t * ground[:, axis] + scene.tile_shift[axis // 2] for axis in (0, 2))
    wave = np.sin(x * np.float32(math.pi / TILE)) * np.sin(z * np.float32(math.pi / TILE))
    # A pixel covers `footprint` units of ground: tiles smaller than that fade to their mean instead of flickering.
    footprint = t * t * np.float32(pixel / EYE_HEIGHT)
    tile = np.clip(wave / (0.08 + 3 * footprint), -1, 1) * np.exp(-((footprint / (0.35 * TILE)) ** 2))
    colour = (light + dark) / 2 + tile[:, None] * (light - dark) / 2
    colour += (1 - np.exp(-t / HAZE_DISTANCE))[:, None] * (0.5 * (hills + horizon) - colour)
    image[down], depth[down] = colour, t
    return image, depth


def _pillars(
    scene: Scene, image: Array, depth: Array, rays: Array, origin: Array, rotation: Array, intrinsics: tuple[float, float, float, float]
) -> None:
    """Draw the pillars that are nearer than `depth`; changes both arrays."""
    haze = 0.5 * (np.array(scene.palette.hills, np.float32) + np.array(scene.palette.horizon, np.float32))
    ambient = 0.5 if scene.palette is PALETTES["dusk"] else 0.62
    for low, high, colour in zip(scene.low, scene.high, scene.colours):
        region = _screen_box(low, high, origin, rotation, intrinsics, depth.shape)
        if region is None:
            continue
        direction = rays[region]
        safe = np.where(np.abs(direction) < 1e-6, np.float32(1e-6), direction)
        a, b = (low - origin) / safe, (high - origin) / safe
        enter, leave = np.minimum(a, b), np.maximum(a, b).min(axis=-1)
        face = enter.argmax(axis=-1)
        t = enter.max(axis=-1)
        hit = (t < leave) & (t > NEAR) & (t < depth[region])
        axis = face[hit]
        facing = -np.sign(direction[hit, axis]) * scene.sun[axis]
        shade = ambient + (1 - ambient) * np.clip(0.35 + facing, 0, 1)
        distance = t[hit]
        fog = 1 - np.exp(-distance / HAZE_DISTANCE)
        lit = colour * shade[:, None]
        image[region][hit] = lit + fog[:, None] * (haze - lit)
        depth[region][hit] = distance


def _screen_box(
    low: Array, high: Array, origin: Array, rotation: Array, intrinsics: tuple[float, float, float, float], shape: tuple[int, ...]
) -> tuple[slice, slice] | None:
    """Rows and columns that a box can cover; None if it is out of view."""
    corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])], np.float32)
    seen = (corners - origin) @ rotation
    if (seen[:, 2] < NEAR).all():
        return None
    if (seen[:, 2] < NEAR).any():
        return slice(0, shape[0]), slice(0, shape[1])
    fx, fy, cx, cy = intrinsics
    x, y = seen[:, 0] / seen[:, 2] * fx + cx, seen[:, 1] / seen[:, 2] * fy + cy
    top, bottom = max(int(y.min()) - 1, 0), min(int(y.max()) + 2, shape[0])
    left, right = max(int(x.min()) - 1, 0), min(int(x.max()) + 2, shape[1])
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None

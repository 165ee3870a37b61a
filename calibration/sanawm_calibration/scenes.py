"""First frames drawn from scratch: simple scenes with sky, ground, depth, texture and sharp edges, enough to exercise an encoder's range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Canvas = NDArray[np.float32]  # (H, W, 3) in [0, 1]
Painter = Callable[[int, int, np.random.Generator], Canvas]


@dataclass(frozen=True)
class Scene:
    """A kind of picture and a prompt that describes it."""

    name: str
    prompt: str
    paint: Painter


def _gradient(width: int, height: int, top: tuple[float, ...], bottom: tuple[float, ...]) -> Canvas:
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    rows = np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share
    return np.repeat(rows, width, axis=1)


def _noise(width: int, height: int, rng: np.random.Generator) -> Canvas:
    """Texture over five octaves, (H, W, 1) in about [-1, 1]."""
    total = np.zeros((height, width), np.float32)
    for octave in range(5):
        cells = 4 * 2**octave
        coarse = Image.fromarray(rng.standard_normal((max(2, cells * height // width), cells)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return np.asarray(total / 3, np.float32)[:, :, None]


def _ground(canvas: Canvas, horizon: int, colour: tuple[float, ...], rng: np.random.Generator, strength: float = 0.15) -> Canvas:
    height, width = canvas.shape[:2]
    below = _gradient(width, height - horizon, tuple(0.6 * c for c in colour), colour)
    canvas[horizon:] = below * (1 + strength * _noise(width, height - horizon, rng))
    return canvas


def _drawn(canvas: Canvas, draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Canvas:
    picture = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    draw_on(ImageDraw.Draw(picture))
    return np.asarray(picture, np.float32) / np.float32(255)


def _shade(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in rng.integers(low, high, 3))
    return r, g, b


def _street(width: int, height: int, rng: np.random.Generator) -> Canvas:
    horizon = height * 9 // 20
    canvas = _ground(_gradient(width, height, (0.35, 0.5, 0.8), (0.85, 0.85, 0.8)), horizon, (0.4, 0.4, 0.42), rng)

    def houses(draw: ImageDraw.ImageDraw) -> None:
        for side in (-1, 1):
            for depth in range(6, 0, -1):
                near, far = width // 2 * (1 + side * 1.1 / depth), width // 2 * (1 + side * 1.1 / (depth + 1))
                roof = horizon - height * float(rng.uniform(0.3, 0.5)) / depth * 1.6
                foot = horizon + height * 0.55 / depth
                shrink = depth / (depth + 1)
                corners = [(near, roof), (far, horizon - (horizon - roof) * shrink), (far, horizon + (foot - horizon) * shrink), (near, foot)]
                draw.polygon(corners, fill=_shade(rng, 90, 210), outline=(40, 40, 40))
                left, wide = min(near, far), abs(near - far)
                for row in range(3):
                    y = roof + (foot - roof) * (0.15 + 0.2 * row)
                    draw.rectangle([left + wide * 0.3, y, left + wide * 0.6, y + (foot - roof) * 0.08], fill=(240, 225, 150))

    return _drawn(canvas, houses)


def _forest(width: int, height: int, rng: np.random.Generator) -> Canvas:
    canvas = _ground(_gradient(width, height, (0.6, 0.75, 0.7), (0.75, 0.85, 0.7)), height * 11 // 20, (0.25, 0.35, 0.15), rng, 0.35)

    def trees(draw: ImageDraw.ImageDraw) -> None:
        for depth in np.sort(rng.uniform(1, 8, 60))[::-1]:
            x, thick = float(rng.uniform(0, width)), width * 0.03 / depth
            foot = height * (0.55 + 0.4 / depth)
            fade = int(150 * depth / 8)
            draw.rectangle([x - thick, 0, x + thick, foot], fill=(50 + fade, 38 + fade, 25 + fade))
            crown = width * 0.12 / depth
            y = height * float(rng.uniform(0, 0.3))
            draw.ellipse([x - crown, y - crown, x + crown, y + crown], fill=(30 + fade // 2, 80 + fade // 2, 30 + fade // 2))

    return np.asarray(_drawn(canvas, trees) * (1 + 0.1 * _noise(width, height, rng)))


def _room(width: int, height: int, rng: np.random.Generator) -> Canvas:
    canvas = _gradient(width, height, (0.75, 0.7, 0.62), (0.6, 0.56, 0.5)) * (1 + 0.03 * _noise(width, height, rng))
    left, right, top, bottom = width * 0.3, width * 0.7, height * 0.3, height * 0.65

    def walls(draw: ImageDraw.ImageDraw) -> None:
        draw.polygon([(0, height), (left, bottom), (right, bottom), (width, height)], fill=(120, 85, 55))
        for share in np.linspace(0, 1, 14):
            draw.line([(left + (right - left) * share, bottom), (width * (share * 1.6 - 0.3), height)], fill=(80, 55, 35), width=2)
        for corner, edge in (((0, 0), (left, top)), ((width, 0), (right, top)), ((0, height), (left, bottom)), ((width, height), (right, bottom))):
            draw.line([corner, edge], fill=(90, 80, 70), width=3)
        draw.rectangle([left, top, right, bottom], outline=(90, 80, 70), width=3)
        draw.rectangle([width * 0.42, height * 0.35, width * 0.58, height * 0.52], fill=(190, 220, 250), outline=(60, 50, 40), width=4)
        draw.rectangle([width * 0.12, height * 0.6, width * 0.3, height * 0.85], fill=_shade(rng, 60, 160))
        draw.ellipse([width * 0.66, height * 0.62, width * 0.8, height * 0.75], fill=_shade(rng, 60, 200))

    return _drawn(canvas, walls)


def _desert(width: int, height: int, rng: np.random.Generator) -> Canvas:
    canvas = _gradient(width, height, (0.25, 0.45, 0.85), (0.95, 0.8, 0.6))
    x = np.arange(width, dtype=np.float32) / width
    for layer in range(5):
        phase, waves = rng.uniform(0, 6.28), rng.uniform(1, 4)
        ridge = height * (0.45 + 0.11 * layer + 0.05 * np.sin(waves * 6.28 * x + phase))
        mask = np.arange(height)[:, None] > ridge[None, :]
        canvas[mask] = np.array([0.9 - 0.1 * layer, 0.7 - 0.09 * layer, 0.45 - 0.06 * layer], np.float32)
    return canvas * (1 + 0.05 * _noise(width, height, rng))


def _harbour(width: int, height: int, rng: np.random.Generator) -> Canvas:
    horizon = height // 2
    canvas = _gradient(width, height, (0.1, 0.12, 0.3), (0.95, 0.5, 0.3))
    mirrored = canvas[:horizon][::-1][: height - horizon] * 0.7
    canvas[horizon : horizon + len(mirrored)] = mirrored * (1 + 0.2 * _noise(width, len(mirrored), rng))

    def boats(draw: ImageDraw.ImageDraw) -> None:
        for depth in np.sort(rng.uniform(1, 5, 12))[::-1]:
            x, y, size = float(rng.uniform(0, width)), horizon + height * 0.35 / depth, width * 0.08 / depth
            draw.polygon([(x - size, y), (x + size, y), (x + size * 0.7, y + size * 0.3), (x - size * 0.7, y + size * 0.3)], fill=_shade(rng, 20, 90))
            draw.line([(x, y), (x, y - size * 2)], fill=(20, 20, 25), width=max(1, int(6 / depth)))
            draw.polygon([(x, y - size * 1.9), (x + size * 0.8, y - size * 0.2), (x, y - size * 0.2)], fill=(230, 220, 205))

    return _drawn(canvas, boats)


def _night(width: int, height: int, rng: np.random.Generator) -> Canvas:
    canvas = _ground(_gradient(width, height, (0.01, 0.01, 0.05), (0.06, 0.06, 0.14)), height * 3 // 5, (0.05, 0.05, 0.07), rng)

    def lights(draw: ImageDraw.ImageDraw) -> None:
        for _ in range(40):
            x, top = float(rng.uniform(0, width)), height * float(rng.uniform(0.2, 0.5))
            side = width * float(rng.uniform(0.02, 0.06))
            draw.rectangle([x, top, x + side, height * 0.6], fill=_shade(rng, 8, 26))
            for _ in range(8):
                u, v = x + side * float(rng.uniform(0.1, 0.9)), float(rng.uniform(top, height * 0.6))
                draw.rectangle([u, v, u + width * 0.003, v + height * 0.006], fill=(255, 230, 160))

    return _drawn(canvas, lights)


SCENES = (
    Scene("street", "A straight street between brick houses on a clear morning, with long perspective and sharp shadows.", _street),
    Scene("forest", "A path through a dense forest of tall trunks, soft light falling through the leaves onto moss.", _forest),
    Scene("room", "A furnished living room with wooden floorboards, a bright window and warm afternoon light.", _room),
    Scene("desert", "Rolling sand dunes under a deep blue sky, ripples of wind in the sand, a hazy horizon far away.", _desert),
    Scene("harbour", "Sailing boats in a calm harbour at sunset, masts mirrored in the water, an orange glow over the sea.", _harbour),
    Scene("night", "A city at night seen from a wide square, lit windows in dark towers and wet ground.", _night),
)
_BY_NAME = {scene.name: scene for scene in SCENES}


def draw(name: str, width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """The named scene as (height, width, 3) uint8; the same seed gives the same picture."""
    canvas = _BY_NAME[name].paint(width, height, np.random.default_rng(seed))
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)

"""A small antialiased drawing surface on Pillow."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]
Colour = tuple[int, int, int] | tuple[int, int, int, int]

PAPER: Colour = (255, 255, 255)
PANEL: Colour = (247, 248, 250)
GRID: Colour = (226, 229, 234)
RULE: Colour = (160, 167, 178)
MUTED: Colour = (101, 110, 123)
INK: Colour = (28, 35, 45)

# Pixels of the finished picture per unit of length, so that it stays sharp on dense displays; and pixels drawn per pixel and axis, which
# are averaged into smooth edges. Text is set at the finished size, where the font's own rasterizer is sharper than any averaging.
_DENSITY = 2
_SAMPLES = 3


class Canvas:
    """Shapes and text; a unit of length is two pixels of the finished picture, the origin is top left.

    Later shapes cover earlier ones, pictures cover shapes, text covers all.
    """

    def __init__(self, width: float, height: float, background: Colour = PAPER) -> None:
        from PIL import Image, ImageDraw

        self.width, self.height = width, height
        self._size = (round(width * _DENSITY), round(height * _DENSITY))
        self._image = Image.new("RGB", (self._size[0] * _SAMPLES, self._size[1] * _SAMPLES), background[:3])
        self._draw = ImageDraw.Draw(self._image, "RGBA")
        self._unit = _DENSITY * _SAMPLES
        self._texts: list[tuple[Point, str, float, Colour, str]] = []
        self._pictures: list[tuple[Any, int, int, Any]] = []

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._unit, y * self._unit) for x, y in points]

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        """A polyline with round joints and ends."""
        scaled = self._scaled(points)
        thickness = max(1, round(width * self._unit))
        self._draw.line(scaled, fill=colour, width=thickness, joint="curve")
        if width > 1:
            for x, y in (scaled[0], scaled[-1]):
                radius = thickness / 2 - 1
                self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def dashes(self, start: Point, end: Point, colour: Colour, width: float = 1.0, dash: float = 5.0, gap: float = 4.0) -> None:
        """A dashed straight line."""
        length = math.dist(start, end)
        if length == 0:
            return
        along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
        position = 0.0
        while position < length:
            stop = min(position + dash, length)
            ends = [(start[0] + along[0] * at, start[1] + along[1] * at) for at in (position, stop)]
            self._draw.line(self._scaled(ends), fill=colour, width=max(1, round(width * self._unit)))
            position += dash + gap

    def arrow(self, start: Point, end: Point, colour: Colour, width: float = 1.2, head: float = 4.0) -> None:
        """A straight line with a filled head at its end."""
        length = math.dist(start, end)
        along = ((end[0] - start[0]) / length, (end[1] - start[1]) / length)
        neck = (end[0] - along[0] * head * 1.5, end[1] - along[1] * head * 1.5)
        self.line([start, neck], colour, width)
        sides = [(neck[0] - turn * along[1] * head * 0.75, neck[1] + turn * along[0] * head * 0.75) for turn in (1, -1)]
        self.polygon([end, *sides], colour)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self._draw.polygon(self._scaled(points), fill=fill)

    def circle(self, centre: Point, radius: float, fill: Colour, outline: Colour | None = None, width: float = 0.0) -> None:
        (x, y), r = self._scaled([centre])[0], radius * self._unit
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=outline, width=round(width * self._unit))

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour, radius: float = 0.0) -> None:
        """A filled rectangle; nothing where it has no area."""
        (x0, y0), (x1, y1) = self._scaled([(left, top), (right, bottom)])
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            self._draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=radius * self._unit, fill=fill)

    def picture(self, image: Any, left: float, top: float, width: float, height: float, radius: float = 0.0) -> None:
        """A PIL image resized to a place, with rounded corners."""
        from PIL import Image, ImageDraw

        size = (round(width * _DENSITY), round(height * _DENSITY))
        mask = Image.new("L", (size[0] * _SAMPLES, size[1] * _SAMPLES), 0)
        corner = (0, 0, mask.size[0] - 1, mask.size[1] - 1)
        ImageDraw.Draw(mask).rounded_rectangle(corner, radius=radius * self._unit, fill=255)
        resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        place = (round(left * _DENSITY), round(top * _DENSITY))
        self._pictures.append((resized, *place, mask.resize(size, Image.Resampling.BOX)))

    def text(self, at: Point, words: str, size: float = 12.0, colour: Colour = INK, anchor: str = "ls") -> None:
        """One line of text; `anchor` is Pillow's: l, m, r across and a, m, s (baseline), d down. The font that comes with Pillow has Latin
        letters and little else."""
        self._texts.append((at, words, size, colour, anchor))

    def finish(self) -> Any:
        """The finished PIL image (RGB)."""
        from PIL import Image, ImageDraw

        image = self._image.resize(self._size, Image.Resampling.BOX)
        for picture, left, top, mask in self._pictures:
            image.paste(picture, (left, top), mask)
        draw = ImageDraw.Draw(image)
        for (x, y), words, size, colour, anchor in self._texts:
            draw.text((round(x * _DENSITY), round(y * _DENSITY)), words, font=_font(size), fill=colour, anchor=anchor)
        return image


@functools.cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size * _DENSITY)


def text_width(words: str, size: float) -> float:
    """Width of a line of text in canvas units."""
    return float(_font(size).getlength(words)) / _DENSITY


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `most` parts."""
    rough = max(span, 1e-9) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def number(value: float, step: float) -> str:
    """A tick's label with the decimals that `step` needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    words = f"{value:.{decimals}f}"
    return words.lstrip("-") if float(words) == 0 else words

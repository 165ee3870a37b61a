"""Pictures of a quality report as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from sanawm_calibration.gates import CAMERA_SHARE_OF_FP8, LATENT_COSINE, LAYER_SQNR, VELOCITY_SQNR
from sanawm_calibration.report import FP8, RecipeReport
from sanawm_calibration.search import FrontierPoint

_COLOURS = {"A": "#c8553d", "B": "#2f6690", "C": "#7a7a7a"}
_LINE = ("#c8553d", "#2f6690", "#8a8a8a", "#3a7d44")


def _figure(width: float = 8, height: float = 3.4) -> tuple[Any, Any]:
    # The object-oriented interface: no display, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def layers(report: RecipeReport) -> bytes:
    """Output SQNR of every quantized layer by role, coloured by tier, one point a block from left to right, with the gates."""
    figure, axes = _figure(height=3.8)
    roles = sorted({(row.tier, row.role) for row in report.layers})
    last = max(row.block for row in report.layers) or 1
    for x, (tier, role) in enumerate(roles):
        rows = [row for row in report.layers if row.role == role]
        axes.plot([x + 0.6 * (r.block / last - 0.5) for r in rows], [r.sqnr for r in rows], "o", color=_COLOURS[tier], alpha=0.7, ms=4)
    axes.set_xticks(range(len(roles)), [f"{role}\n({tier})" for tier, role in roles], fontsize=7)
    for layer_format, value in LAYER_SQNR.items():
        axes.axhline(value, color="#444444", lw=0.8, ls="--")
        axes.annotate(f"gate of {layer_format}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(ylabel="output SQNR, dB")
    return _png(figure)


def velocity(report: RecipeReport) -> bytes:
    """Velocity SQNR at each timestep, recipe beside FP8."""
    figure, axes = _figure()
    labels = list(next(iter(report.velocity.values())))
    width = 0.8 / len(report.velocity)
    for i, (name, values) in enumerate(report.velocity.items()):
        axes.bar([x + i * width for x in range(len(labels))], [values[label] for label in labels], width * 0.95, label=name, color=_LINE[i])
    axes.axhline(VELOCITY_SQNR, color="#444444", lw=0.8, ls="--")
    axes.set_xticks([x + width * (len(report.velocity) - 1) / 2 for x in range(len(labels))], labels)
    axes.set(xlabel="timestep", ylabel="velocity SQNR, dB")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def drift(report: RecipeReport) -> bytes:
    """Latent SQNR of free runs over the chunks; another seed's line shows how far apart two equally good videos are."""
    figure, axes = _figure()
    for i, (name, values) in enumerate(report.free.items()):
        label = f"{name}: {report.drift[name]:+.2f} dB a chunk"
        axes.plot(range(len(values)), values, "o-", color=_LINE[i], label=label, ms=4)
    axes.set(xlabel="chunk", ylabel="latent SQNR of the free run, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return _png(figure)


def cosines(report: RecipeReport) -> bytes:
    """Distance of the latent cosine from 1 at each chunk, from the reference's state, and the camera-delta cosine."""
    figure, axes = _figure()
    for i, (name, values) in enumerate(report.cosine.items()):
        axes.plot(range(len(values)), [max(1e-8, 1 - v) for v in values], "o-", color=_LINE[i], ms=4, label=name)
    axes.axhline(1 - LATENT_COSINE, color="#444444", lw=0.8, ls="--")
    axes.set_yscale("log")
    axes.set(xlabel="chunk", ylabel="1 - latent cosine")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return _png(figure)


def camera(report: RecipeReport) -> bytes:
    """Camera-delta cosine of the recipe and FP8, with the gate."""
    figure, axes = _figure(5, 2.2)
    names = list(report.camera)
    axes.barh(names, [report.camera[n] for n in names], color=_LINE[: len(names)], height=0.6)
    axes.axvline(CAMERA_SHARE_OF_FP8 * report.camera[FP8], color="#444444", lw=0.8, ls="--")
    axes.set(xlabel="cosine of the change that a turned camera makes", xlim=(0, 1))
    return _png(figure)


def memory(report: RecipeReport) -> bytes:
    """Bytes of weights by format, beside bfloat16."""
    figure, axes = _figure(6, 2)
    start = 0.0
    unit = 1e9 if sum(report.nbytes.values()) > 1e8 else 1e6
    for (name, size), colour in zip(report.nbytes.items(), ("#c8553d", "#2f6690", "#8a8a8a")):
        axes.barh(["weights"], [size / unit], left=start, color=colour, label=f"{name} {size / unit:.2f}")
        start += size / unit
    axes.set(xlabel="GB" if unit == 1e9 else "MB")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    return _png(figure)


def ranges(report: RecipeReport) -> bytes:
    """Share of each static input scale's range that the rollouts reached; 1 is where clipping would begin."""
    figure, axes = _figure(height=2.6)
    used = sorted(row.range_used for row in report.layers)
    axes.step(range(1, len(used) + 1), used, where="mid", color=_LINE[0])
    axes.axhline(1, color="#444444", lw=0.8, ls="--")
    axes.set(xlabel="layers, sorted", ylabel="largest input / clipping limit", ylim=(0, 1.08))
    return _png(figure)


def frontier(points: Sequence[FrontierPoint], recipes: Sequence[FrontierPoint] = ()) -> bytes:
    """Worst velocity SQNR and camera-delta cosine over the bytes of weights: the search's way, and fixed recipes beside it."""
    figure, axes = _figure(8, 4)
    unit, name = (1e9, "GB") if max(p.nbytes for p in points) > 1e8 else (1e6, "MB")
    way = [p for p in points if not p.measured and math.isfinite(p.velocity_sqnr)]
    axes.plot([p.nbytes / unit for p in way], [p.velocity_sqnr for p in way], "-", color=_LINE[0], label="search, predicted")
    for point, colour in [(p, _LINE[0]) for p in points if p.measured] + [(p, _LINE[1]) for p in recipes]:
        if not math.isfinite(point.velocity_sqnr):
            continue
        axes.plot([point.nbytes / unit], [point.velocity_sqnr], "o", color=colour)
        text = f"{point.label} ({point.camera_cosine:.2f})"
        axes.annotate(text, (point.nbytes / unit, point.velocity_sqnr), textcoords="offset points", xytext=(6, -11), fontsize=8)
    axes.axhline(VELOCITY_SQNR, color="#444444", lw=0.8, ls="--")
    axes.set(xlabel=f"weights, {name}", ylabel="worst timestep's velocity SQNR, dB", ylim=(5, 45))
    axes.set_title("measured points carry their camera-delta cosine", fontsize=9, loc="left")
    axes.legend(fontsize=8)
    return _png(figure)

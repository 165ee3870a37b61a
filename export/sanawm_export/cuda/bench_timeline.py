"""A picture of what the device's streams did while a clip was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sanawm_export.cuda.bench import Span

_COLOURS = {"camera": "#56967e", "denoise": "#2e5c9e", "decode": "#e28c34", "copy": "#969eaa"}
_LANES = {"transformer": "camera, denoising", "other": "decoding", "copy": "copy to host"}


def draw(path: Path, spans: Sequence[Span], title: str, chunks: int = 8) -> None:
    """Write a PNG of the first `chunks` chunks above the whole clip; one lane a stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes = [name for name in _LANES if any(span.stream == name for span in spans)]
    ends = sorted(span.end for span in spans if span.stage == "copy") or [max(span.end for span in spans)]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, limit in zip(figure.subplots(2, 1), (ends[min(chunks, len(ends)) - 1], ends[-1])):
        for span in spans:
            if span.begin < limit:
                axes.broken_barh([(span.begin, span.end - span.begin)], (lanes.index(span.stream) - 0.36, 0.72), facecolors=_COLOURS[span.stage])
        axes.set_yticks(range(len(lanes)), [_LANES[name] for name in lanes])
        axes.set_xlim(0, limit)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_title(title, loc="left", fontsize=11)
    figure.axes[1].set_xlabel("seconds since the clip began")
    figure.legend(handles=[Patch(color=colour, label=stage) for stage, colour in _COLOURS.items()], loc="outside upper right", ncols=4, frameon=False)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=140, format="png")
    temporary.replace(path)

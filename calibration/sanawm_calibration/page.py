"""The quality report as one HTML file with its pictures inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence

from sanawm_calibration import plots
from sanawm_calibration.gates import Gate
from sanawm_calibration.report import CAVEAT, OTHER_SEED, RecipeReport
from sanawm_calibration.search import FrontierPoint

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.pass { color: #2d6a35; } .fail { color: #b3261e; font-weight: 600; } .note { background: #f4f1ea; padding: .7rem 1rem; border-radius: .3rem; }
details { margin-top: 1rem; } figure { margin: .5rem 0; } figcaption { font-size: .85rem; color: #555; }
"""


def _picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f'<td class="n">{html.escape(text)}</td>'


def _gate_rows(gates: Sequence[Gate]) -> list[list[str]]:
    verdicts = {True: '<td class="pass">passed</td>', False: '<td class="fail">failed</td>'}
    return [[g.name, _cell(_number(g.value, 3)), _cell(_number(g.limit, 3)), verdicts[g.passed]] for g in gates]


def render(report: RecipeReport, frontier: tuple[Sequence[FrontierPoint], Sequence[FrontierPoint]] | None = None) -> str:
    """The page; `frontier` is the search's way and measured recipes beside it."""
    facts = report.facts
    model_level = [g for g in report.gates if not g.name.startswith("layer ")]
    layer_level = sorted((g for g in report.gates if g.name.startswith("layer ")), key=lambda g: g.value - g.limit)
    verdict = "passes every gate" if report.passed else f"fails {len(report.failed)} of {len(report.gates)} gates"
    state = "pass" if report.passed else "fail"
    total = sum(report.nbytes.values())
    seed_first = next(iter(report.free[OTHER_SEED]), math.nan)
    parts = [
        f"<h1>Precision recipe {html.escape(report.recipe)} on {html.escape(str(facts['model']))}</h1>",
        f"<p>{html.escape(report.description)}</p>",
        f'<p class="{state}">The recipe {verdict}.</p>',
        f'<p class="note">{html.escape(CAVEAT)}</p>',
        f"<p>Reference: the same weights in {html.escape(str(facts['reference']))}; {len(facts['clips'])} clips of up to {facts['chunks']} chunks; "
        f"checkpoint {html.escape(str(facts['checkpoint'].get('source')))}. Weights take {total / 1e9:.3f} GB.</p>",
        "<h2>Gates of the model</h2>",
        _table(("gate", "measured", "at least", ""), _gate_rows(model_level)),
        "<h2>Velocity at each timestep</h2>",
        _picture(plots.velocity(report), "Signal to quantization noise of the velocity on the reference's own inputs."),
        "<h2>Latents over the stream</h2>",
        _picture(plots.cosines(report), "One chunk from the reference's state: how far its final latents turn away."),
        _picture(
            plots.drift(report),
            "Running freely from the same noise. The run with another seed is the reference itself: two videos that are both right differ by that "
            f"much ({_number(seed_first, 1)} dB at chunk 0), so a curve far above its line is a small error beside the choice of the seed.",
        ),
        "<h2>Camera following</h2>",
        _picture(plots.camera(report), "A turn key is held during the chunk: the change in velocity it makes, compared with the reference's change."),
        "<h2>Layers</h2>",
        _picture(plots.layers(report), "Output of each layer on sampled inputs of its own. Tiers: A 4-bit, B 8-bit."),
        _table(("closest to its gate", "measured", "at least", ""), _gate_rows(layer_level[:10])),
        "<h2>Range and memory</h2>",
        _picture(plots.ranges(report), "No value was clipped: a value over its limit stops the measurement with the layer's name."),
        _picture(plots.memory(report), "Weights as stored, scales and corrections included."),
    ]
    if frontier:
        caption = "Quality over size: what the search promoted, from the cheapest mix to bfloat16."
        parts += ["<h2>Frontier</h2>", _picture(plots.frontier(*frontier), caption)]
    rows = [
        [r.name, r.format, _cell(_number(r.sqnr)), _cell(f"{r.range_used:.3f}"), _cell(f"{r.nbytes / 1e6:.3f}")]
        for r in sorted(report.layers, key=lambda r: r.sqnr)
    ]
    parts.append(f"<details><summary>All layers</summary>{_table(('layer', 'format', 'SQNR, dB', 'range used', 'MB'), rows)}</details>")
    title = html.escape(f"{report.recipe} on {facts['model']}")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><body>{"".join(parts)}</body></html>\n'

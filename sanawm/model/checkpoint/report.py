"""Checkpoint descriptions as text for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TITLES = {"dit": "transformer", "vae": "VAE", "text_encoder": "text encoder"}


def render_inspection(report: dict[str, Any]) -> RenderableType:
    """Renderable of `inspect_checkpoint`'s result: what it is, parameters per part, and what differs."""
    kind = "tensor file" if report["kind"] == "file" else f"{report['kind'].replace('_', '-')} checkpoint"
    lines = [Text.assemble((report["source"], "bold"), f"  {kind}")]
    if report["commit"]:
        lines.append(Text(f"hub commit {report['commit']}"))
    if dit := report["dit"]:
        every = f"softmax attention every {dit['softmax_every']}"
        lines.append(Text(f"{dit['depth']} blocks of width {dit['hidden']}, head width {dit['head_dim']}, {every}"))
    if config := report["config"]:
        grid, stride = config["dit"], config["vae"]["patch"] * 8
        lines.append(
            Text(f"model {config['name']}: {grid['width'] * stride}x{grid['height'] * stride} pixels, {grid['text_tokens']} text tokens")
        )
    if chi := report["chi_prompt"]:
        origin = "the released one" if chi["released"] else "a stand-in"
        lines.append(Text(f"prompt prefix: {chi['characters']} characters, {origin}"))
    table = Table("part", "tensors", "dtype", "group", "parameters", box=None, header_style="bold", pad_edge=False)
    for column in (1, 4):
        table.columns[column].justify = "right"
    for name, part in report["parts"].items():
        dtypes = ", ".join(part["dtypes"])
        disk = f"{sum(file['bytes'] for file in part['files']) / 1e9:.3f} GB on disk"
        table.add_row(Text(_TITLES[name], "bold"), f"{part['tensors']:,}", dtypes, disk, f"{part['parameters']:,}")
        for group, count in part["groups"].items():
            table.add_row("", "", "", group, f"{count:,}")
    parts: list[RenderableType] = [*lines, table]
    parts += [Text(problem, "red") for problem in report["problems"]]
    parts.append(Text("all tensors as expected", "green") if report["ok"] else Text(f"{len(report['problems'])} problem(s)", "bold red"))
    return Group(*parts)


def render_expected(preset: str, table: dict[str, Any]) -> RenderableType:
    """Renderable of `expected(preset)`'s result: every name and shape, and the number of parameters."""
    out = Table("tensor", "shape", box=None, header_style="bold", pad_edge=False)
    for name, shape in table["tensors"].items():
        out.add_row(Text(name), "x".join(map(str, shape)))
    return Group(out, Text(f"{len(table['tensors'])} tensors, {table['parameters']:,} parameters (preset {preset})", "bold"))

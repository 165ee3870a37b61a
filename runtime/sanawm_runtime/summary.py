"""What a bundle is, as data and on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sanawm_runtime.bundle import Bundle, Manifest
from sanawm_runtime.memory import device_memory, size_text


def bundle_summary(bundle: Bundle) -> dict[str, Any]:
    """The manifest's essentials as plain data: identity, target, precision, programs with their I/O, sizes, versions, what is unverified."""
    m = bundle.manifest
    config = m.config
    memory = device_memory(bundle)
    return {
        "path": str(bundle.root),
        "digest": bundle.digest,
        "name": m.name,
        "created": m.created,
        "target": {"name": m.target.name, "engine": m.target.engine, "capability": m.target.capability},
        "precision": {"recipe": m.precision.recipe, "summary": m.precision.summary},
        "image": {"height": config.image_height, "width": config.image_width, "fps": config.stream.fps},
        "programs": {
            name: {
                "file": p.file,
                "inputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in p.inputs],
                "outputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in p.outputs],
                "extras": p.extras,
            }
            for name, p in m.programs.items()
        },
        "files": {name: entry.size for name, entry in m.files.items()},
        "bytes": m.total_bytes(),
        "device_memory": None if memory is None else {**asdict(memory), "whole": memory.whole, "streaming": memory.streaming},
        "versions": m.versions,
        "checkpoint": {"source": m.checkpoint.source, "kind": m.checkpoint.kind, "revision": m.checkpoint.revision, "sha256": m.checkpoint.sha256},
        "calibration": m.calibration,
        "parity": m.parity,
        "unverified": list(m.unverified),
    }


def render_bundle(bundle: Bundle) -> RenderableType:
    """A page for a person: what the bundle is for, its programs, where it came from."""
    m = bundle.manifest
    config, target = m.config, m.target
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    device = f"{target.name} ({target.capability})" if target.capability and target.capability != target.name else target.name
    rows = [
        ("world", f"{m.name}, {config.image_width}x{config.image_height} at {config.stream.fps} frames a second"),
        ("target", f"{device}, {target.engine} engine"),
        ("precision", _precision(m)),
        ("calibration", _calibration(m)),
        ("parity", _parity(m)),
        ("size", f"{size_text(m.total_bytes())} in {len(m.files)} files"),
        *_memory(bundle),
        ("checkpoint", m.checkpoint.source + (f" at {m.checkpoint.revision}" if m.checkpoint.revision else "")),
        ("built", f"{m.created} with " + ", ".join(f"{k} {v}" for k, v in m.versions.items())),
        ("digest", bundle.digest[:16]),
    ]
    for name, text in rows:
        facts.add_row(name, text)
    parts: list[RenderableType] = [facts, _programs(m)]
    kernels = _kernels(m)
    if kernels.row_count:
        parts.append(kernels)
    parts += [Text(f"unverified: {sentence}", style="yellow") for sentence in m.unverified]
    return Group(*parts)


def _memory(bundle: Bundle) -> Iterator[tuple[str, str]]:
    memory = device_memory(bundle)
    if memory is not None:
        shown = f"{size_text(memory.whole)} ({memory}); {size_text(memory.streaming)} with --free-encoders; the driver's own comes on top"
        yield "device memory", shown


def _counts(counts: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) if isinstance(counts, dict) else ""


def _precision(m: Manifest) -> str:
    summary = m.precision.summary
    realised, planned = _counts(summary.get("realised")), _counts(summary.get("products"))
    if realised:
        return f"{m.precision.recipe}: {realised} products" + (", read back from the engines" if summary.get("audited") else ", not read back")
    return f"{m.precision.recipe}: {planned} products a step, the rest in {summary['activations']}" if planned else m.precision.recipe


def _calibration(m: Manifest) -> str:
    if m.calibration is None:
        return "none"
    known = m.calibration
    return f"{known.get('clips', '?')} clips, file {str(known.get('file_sha256', ''))[:16]}: {known.get('description', '')}"


def _parity(m: Manifest) -> str:
    if m.parity is None:
        return "not measured when it was built"
    return f"{m.parity['program']}: {m.parity['sqnr_db']:.1f} dB against {m.parity['against']}, on {m.parity['engine']}"


def _programs(m: Manifest) -> Table:
    table = Table("program", "inputs", "outputs", "products", "file", "size")
    for name, p in m.programs.items():
        table.add_row(name, str(len(p.inputs)), str(len(p.outputs)), _counts(p.extras.get("precision")), p.file, size_text(m.files[p.file].size))
    return table


def _kernels(m: Manifest) -> Table:
    """The kernels of ours inside engines, each once."""
    table = Table("kernel", "architecture", "registers", "shared memory")
    seen: dict[str, dict[str, Any]] = {}
    for p in m.programs.values():
        rows = p.extras.get("kernels")
        for row in rows if isinstance(rows, list) else []:
            seen.setdefault(row["name"], row)
    for name, row in seen.items():
        table.add_row(name, row["capability"], str(row["registers"]), size_text(row["shared"]))
    return table

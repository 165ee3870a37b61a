"""Export of a whole checkpoint into a directory, with a report of time and memory."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sanawm.errors import UserError
from sanawm.model.checkpoint import Checkpoint
from sanawm.programs import PARTS, Geometry, programs
from sanawm.schedule import first_chunk_frames
from sanawm_export.build import PRECISION_DTYPES, open_prompt
from sanawm_export.onnx.export import export_part
from sanawm_export.parts import load_part


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    precision: str = "fp32",
    latents: int = 121,
    names: Sequence[str] = (),
    cpu: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the programs (all, or `names`) as checked ONNX graphs into the new directory `out`.

    Returns {"programs": [{name, file, weights, bytes, seconds}], "bytes", "seconds", "peak_rss"}. The transformer alone needs no text encoder
    in the checkpoint. Raises UserError; what was written is removed unless everything succeeds.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; choose another")
    checkpoint.check()
    config = checkpoint.world
    dtype = PRECISION_DTYPES[precision]
    tokens = config.dit.text_tokens if checkpoint.tokenizer_file is None else open_prompt(checkpoint).max_length
    geometry = Geometry(config, tokens, first_chunk_frames(latents, config.stream.chunk_frames), dtype)
    table = programs(geometry)
    if unknown := sorted(set(names) - set(table)):
        raise UserError(f"no program {', '.join(unknown)}; the programs are {', '.join(table)}")
    wanted = [n for n in table if not names or n in names]
    started, rows = time.perf_counter(), []
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for part_name in PARTS:
            chosen = [n for n in programs(geometry, (part_name,)) if n in wanted]
            if not chosen:
                continue
            part = load_part(checkpoint, part_name, getattr(torch, dtype))
            begin = time.perf_counter()
            announce = None if progress is None else lambda n: progress(n, wanted.index(n), len(wanted))
            for exported in export_part(part_name, part, geometry, partial, names=chosen, cpu=cpu, on_program=announce):
                size = (partial / exported.file).stat().st_size
                seconds = time.perf_counter() - begin
                rows.append({"name": exported.program.name, "file": exported.file, "weights": exported.weights, "bytes": size, "seconds": seconds})
                begin = time.perf_counter()
            del part
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    total = sum(f.stat().st_size for f in out.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"programs": rows, "bytes": total, "seconds": time.perf_counter() - started, "peak_rss": peak}

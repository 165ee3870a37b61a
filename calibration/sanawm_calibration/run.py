"""`sanawm calibrate` as one function: rollouts, statistics, search, report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sanawm
from sanawm.errors import InputError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm_calibration import collect, modelopt_cpu, page, plots, store
from sanawm_calibration.clips import GENERATED, Clip, open_set
from sanawm_calibration.cost import CostModel
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.generated import generated_set
from sanawm_calibration.inputs import ClipInputs, encode_clips, load_transformer, open_tokenizer
from sanawm_calibration.recipe import DEFAULT_RECIPE, LayerTable, layer_table, load_recipe, recipe_names
from sanawm_calibration.report import FP8, RecipeReport, candidate, make_report
from sanawm_calibration.search import FrontierPoint, SearchResult, frontier_point, greedy
from sanawm_calibration.sensitivity import Noise, ladder, measure, noise, record_points
from sanawm_calibration.store import Calibration

# phase, item, items done, items in all
Progress = Callable[[str, str, int, int], None]
# Recorded where they are installed: statistics need no modelopt.
_PACKAGES = ("torch", "nvidia-modelopt")
# Judged clips start from other noise than calibrated ones, so that nothing is judged on the very activations it was fitted to.
_JUDGE_SEED = 500_000
_STREAM_PIXELS = 24


@dataclass(frozen=True)
class Request:
    """What to calibrate and what to do with it.

    `clips` and `chunks` bound the set (of a generated set they are its size); `judged` is how many of its clips the search and the report
    roll out again.
    """

    checkpoint: Checkpoint
    data: str = GENERATED
    output: Path = Path("calibration.json")
    clips: int = 16
    chunks: int = 8
    rows: int = 128
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    search: bool = False
    target: str = "rtx5090"
    recipe: str = DEFAULT_RECIPE
    report: Path | None = None
    judged: int = 2


@dataclass
class Outcome:
    """What was written and found."""

    calibration: Calibration
    files: list[Path] = field(default_factory=list)
    search: SearchResult | None = None
    recipes: list[FrontierPoint] = field(default_factory=list)
    report: RecipeReport | None = None


def run(request: Request, progress: Progress) -> Outcome:
    """Calibrate; raises CalibrationError, RecipeError and the errors of the checkpoint and the clips."""
    _check_device(request.device)
    if request.output.suffix != ".json":
        raise CalibrationError(f"{request.output}: expected the calibration file's name to end in .json")
    # Mistakes in names and missing packages come before hours of work.
    cost = CostModel(request.checkpoint.world, request.target)
    load_recipe(request.recipe)
    if request.search or request.report is not None:
        modelopt_cpu.load()
    clips = select_clips(request)
    progress("encode", "prompts and first frames", 0, 1)
    inputs = encode_clips(request.checkpoint, clips, request.dtype, request.device)
    model = load_transformer(request.checkpoint, request.dtype, request.device)
    calibration = _statistics(request, clips, inputs, model, progress)
    outcome = Outcome(calibration)
    judged = _judged(inputs, request.judged)
    if request.search:
        _search(request, outcome, model, judged, cost, progress)
    store.write(calibration, request.output)
    outcome.files[:0] = [request.output, store.tensor_file(request.output)]
    if request.report is not None:
        outcome.report = make_report(model, calibration, judged, request.recipe, lambda what, done, total: progress("report", what, done, total))
        frontier = (outcome.search.frontier, outcome.recipes) if outcome.search else None
        _write(request.report, page.render(outcome.report, frontier).encode())
        data = json.dumps(outcome.report.to_json(), indent=1, allow_nan=False)
        _write(request.report.with_suffix(".json"), data.encode())
        outcome.files += [request.report, request.report.with_suffix(".json")]
    return outcome


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"the device {device} was asked for and torch finds no CUDA GPU; use --device cpu")


def select_clips(request: Request) -> list[Clip]:
    """The clips of the request's set, bounded by its numbers."""
    world = request.checkpoint.world
    if request.data == GENERATED:
        tokenizer = open_tokenizer(request.checkpoint)

        def fits(prompt: str) -> bool:
            try:
                tokenizer.encode(prompt)
            except InputError:
                return False
            return True

        return generated_set(request.clips, request.chunks, (world.image_width, world.image_height), fits)
    return [clip.limited(_STREAM_PIXELS * request.chunks + 1) for clip in open_set(request.data)[: request.clips]]


def _statistics(
    request: Request, clips: Sequence[Clip], inputs: Sequence[ClipInputs], model: SanaWM, progress: Progress
) -> Calibration:
    world = request.checkpoint.world
    fingerprint = request.checkpoint.fingerprint()
    identity = {"checkpoint": fingerprint, "dtype": str(request.dtype), "stream": dataclasses.asdict(world.stream)}

    def step(clip: str, done: int, total: int, chunk: int, chunks: int) -> None:
        progress("rollout", f"{clip}, chunk {chunk} of {chunks}", done * chunks + chunk, total * chunks)

    folder = request.output.with_suffix(".clips")
    shards = collect.collect(model, inputs, world.stream, folder, identity, rows=request.rows, progress=step)
    return store.build(
        shards,
        world,
        checkpoint={"source": request.checkpoint.source, "kind": request.checkpoint.kind, "fingerprint": fingerprint},
        clips=[clip.describe() for clip in clips],
        settings={"data": request.data, "rows": request.rows, "dtype": str(request.dtype).removeprefix("torch."), "device": request.device},
        versions={"sanawm": sanawm.__version__, **dict(_installed())},
    )


def _installed() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _judged(inputs: Sequence[ClipInputs], count: int) -> list[ClipInputs]:
    """Clips spread evenly over the set, with other noise."""
    chosen = [inputs[i * len(inputs) // min(count, len(inputs))] for i in range(min(count, len(inputs)))]
    return [dataclasses.replace(item, clip=dataclasses.replace(item.clip, seed=item.clip.seed + _JUDGE_SEED)) for item in chosen]


def _search(
    request: Request, outcome: Outcome, model: SanaWM, judged: Sequence[ClipInputs], cost: CostModel, progress: Progress
) -> None:
    calibration, world = outcome.calibration, request.checkpoint.world
    points = record_points(model, judged, world)
    steps = ladder([name for name in ("nvfp4", "fp8", "bf16") if cost.supports(name)])

    def measured(table: LayerTable) -> Noise:
        return noise(candidate(model, table, calibration), points)

    found = measure(model, calibration, points, steps[:-1], progress=lambda name, done, total: progress("sensitivity", name, done, total))
    progress("search", "promoting layers", 0, 1)
    fp8 = measured(layer_table(load_recipe(FP8), world.dit))
    outcome.search = greedy(found, steps, cost, fp8, measured)
    calibration.search = outcome.search.to_json() | {"chosen_bytes": cost.total(outcome.search.table)[0]}
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.from_search or not recipe.rules:
            continue
        table = layer_table(recipe, world.dit)
        if all(cost.supports(f.format) for f in table.values()):
            outcome.recipes.append(frontier_point(cost, table, measured(table), True, label=name))
    picture = request.output.with_name(f"{request.output.stem}-frontier.png")
    _write(picture, plots.frontier(outcome.search.frontier, outcome.recipes))
    outcome.files.append(picture)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def summary(outcome: Outcome) -> dict[str, Any]:
    """The outcome as a program reads it."""
    data: dict[str, Any] = {
        "files": [str(path) for path in outcome.files],
        "clips": len(outcome.calibration.clips),
        "sources": len(outcome.calibration.summary),
    }
    if outcome.search is not None:
        formats = [f.label for f in outcome.search.table.values()]
        data["search"] = {
            "target": outcome.search.target,
            "formats": {label: formats.count(label) for label in sorted(set(formats))},
            "measured": outcome.search.measured,
            "recipes": [_point(p) for p in outcome.recipes],
            "frontier": [_point(p) for p in outcome.search.frontier],
        }
    if outcome.report is not None:
        data["report"] = {"recipe": outcome.report.recipe, "passed": outcome.report.passed, "failed": [g.name for g in outcome.report.failed]}
    return data


def _point(point: FrontierPoint) -> dict[str, Any]:
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in point.to_json().items()}

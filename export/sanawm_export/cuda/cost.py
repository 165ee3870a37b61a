"""Bounds of a plan and projections to other GPUs: arithmetic on the plan's bytes and FLOPs, and on what was achieved on one GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sanawm.errors import UserError
from sanawm_runtime.engines._cuda_plan import Copy, Plan, Step


@dataclass(frozen=True)
class Gpu:
    """Peak rates: dense tensor-core TFLOP/s by unit, memory in TB/s, and where they are from."""

    name: str
    tflops: Mapping[str, float]
    terabytes: float
    source: str


def _gpu(name: str, bf16: float, fp8: float, nvfp4: float, tf32: float, fp32: float, terabytes: float, source: str) -> Gpu:
    return Gpu(name, {"bf16": bf16, "fp8": fp8, "nvfp4": nvfp4, "tf32": tf32, "fp32": fp32}, terabytes, source)


# nvfp4 0: no such units.
GPUS = {
    g.name: g
    for g in (
        _gpu("h200", 989, 1979, 0, 495, 67, 4.8, "NVIDIA data sheet, H200 SXM, dense"),
        _gpu("h100", 989, 1979, 0, 495, 67, 3.35, "NVIDIA data sheet, H100 SXM, dense"),
        _gpu("b200", 2250, 4500, 9000, 1125, 75, 8.0, "NVIDIA data sheet, B200, dense"),
        _gpu("rtx5090", 209, 419, 1676, 105, 105, 1.79, "NVIDIA architecture paper, RTX 5090, dense, float32 sums"),
        _gpu("rtx4090", 165, 330, 0, 83, 83, 1.01, "NVIDIA architecture paper, RTX 4090, dense, float32 sums"),
    )
}


# Share of its floor that each class of operations reaches, in bf16 and FP8 together, with the floor from the data sheet's arithmetic and a copy's
# bandwidth. From `benchmarks/engine_shares.py` on the rows of an H200, 2026-11-28; NVFP4 products have not been timed and are taken for FP8's.
ACHIEVED: Mapping[str, float] = MappingProxyType({
    "gemm.bf16": 0.62, "gemm.fp8": 0.56, "gemm.nvfp4": 0.56, "attention": 0.60, "gdn": 0.41, "tokenwise": 0.74, "conv": 0.65,
    "copy": 0.33, "chunk": 0.11,
})  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What a projection takes for granted of every GPU, because it was measured on an H200.

    shares: of its floor that a class of operations reaches, `others` where it was not timed; memory: a copy's part of the data sheet's
    bandwidth; gap_us: what a chunk takes beyond the sum of its launches, for each of them.
    """

    shares: Mapping[str, float] = field(default_factory=lambda: dict(ACHIEVED))
    others: float = 0.3
    memory: float = 0.87
    gap_us: float = 2.9


def operation_class(step: Step) -> str:
    """The class of operations that a step belongs to: its kernel's family, and the units of a product."""
    if isinstance(step, Copy):
        return "copy"
    family = step.kernel.partition(".")[0]
    return f"gemm.{_units(step)}" if family == "gemm" else family


def _units(step: Step) -> str:
    return step.unit or "bf16"


def floor_us(step: Step, gpu: Gpu, memory: float = 1.0) -> float:
    """The larger of the step's arithmetic at peak and its minimal traffic at `memory` of the peak, microseconds.

    Raises UserError for missing units.
    """
    peak = gpu.tflops[_units(step)]
    if step.flops and not peak:
        raise UserError(f"{gpu.name} has no {_units(step)} units, which {step.label} needs; choose another GPU or precision")
    arithmetic = step.flops / (peak * 1e6) if step.flops else 0.0
    return max(arithmetic, (step.read_bytes + step.write_bytes) / (gpu.terabytes * memory * 1e6))


def step_us(step: Step, gpu: Gpu, given: Assumptions) -> float:
    """Time of a step under assumptions, microseconds."""
    return floor_us(step, gpu, given.memory) / given.shares.get(operation_class(step), given.others) + given.gap_us


def achieved(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of its floor that each class of operations reached, from the rows that `bench` writes for them."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        if "class" in row:
            both = sums.setdefault(row["class"], [0.0, 0.0])
            both[0] += row["floor"]
            both[1] += row["value"]
    return {name: floor / value for name, (floor, value) in sorted(sums.items()) if value}


def gap_us(rows: Iterable[Mapping[str, Any]], recipe: str, steps: int) -> float | None:
    """What a chunk of `steps` denoising steps takes beyond the sum of its launches, for each of them; None where that was not measured."""
    by_case = {row["case"]: row for row in rows}
    chunk = by_case.get(f"engine.chunk.{recipe}")
    total = count = 0.0
    for case, row in by_case.items():
        for program, times in (("denoise_steady", steps), ("commit_steady", 1)):
            if case.startswith(f"engine.{program}.") and case.endswith(f".{recipe}"):
                total, count = total + times * row["value"], count + times * row["launches"]
    return (chunk["value"] * 1e6 - total) / count if chunk is not None and count else None


@dataclass(frozen=True)
class Cost:
    """Sums over a plan: launches and copies, bytes, FLOPs, microseconds at the floor and under the assumptions."""

    steps: int
    nbytes: int
    flops: int
    floor_us: float
    projected_us: float


def cost(plan: Plan, gpu: Gpu, given: Assumptions | None = None) -> Cost:
    """Totals of a plan on a GPU."""
    given = given or Assumptions()
    steps = plan.steps
    return Cost(
        len(steps), sum(s.read_bytes + s.write_bytes for s in steps), sum(s.flops for s in steps), sum(floor_us(s, gpu) for s in steps),
        sum(step_us(s, gpu, given) for s in steps),
    )  # fmt: skip


def clip_seconds(plans: Mapping[str, Plan], gpu: Gpu, chunks: int, steps: int, given: Assumptions | None = None) -> float:
    """Projected seconds of the denoising of a clip: `steps` forwards, the clean pass and the camera program of each chunk."""
    kinds = [("first", "camera_first"), ("second", "camera")] + [("steady", "camera")] * (chunks - 2)
    total = 0.0
    for kind, camera in kinds[:chunks]:
        names = [camera, *[f"denoise_{kind}"] * steps, f"commit_{kind}"]
        total += sum(cost(plans[name], gpu, given).projected_us for name in names)
    return total / 1e6


def operation_name(label: str) -> str:
    """A step's label without the number of its block."""
    parts = label.split(".")
    return ".".join(parts[2:]) if parts[0] in ("blocks", "layers") and len(parts) > 2 else label


def by_operation(steps: Iterable[Step], gpu: Gpu) -> list[tuple[str, int, int, int, float]]:
    """(operation, count, bytes, FLOPs, floor in microseconds) summed over blocks, the costliest first."""
    rows: dict[str, list[float]] = {}
    for step in steps:
        row = rows.setdefault(operation_name(step.label), [0, 0, 0, 0.0])
        for i, value in enumerate((1, step.read_bytes + step.write_bytes, step.flops, floor_us(step, gpu))):
            row[i] += value
    return sorted(((n, int(r[0]), int(r[1]), int(r[2]), r[3]) for n, r in rows.items()), key=lambda row: -row[4])

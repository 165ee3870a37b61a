"""Bounds of a plan and projections to other GPUs: arithmetic on the plan's bytes and FLOPs, never a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sanawm.errors import UserError
from sanawm_runtime.engines._cuda_plan import Plan, Step


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


@dataclass(frozen=True)
class Assumptions:
    """What a projection takes for granted: the share of each peak that kernels reach, and the time between kernels of a graph.

    The defaults are assumptions, not measurements of this engine: large bf16 and FP8 products through a vendor library reach 0.7 to 0.8 of the
    peak on an H200, and a device copy 0.89 of its memory's.
    """

    products: float = 0.65
    memory: float = 0.8
    gap_us: float = 1.0


def _units(step: Step) -> str:
    return step.unit or "bf16"


def floor_us(step: Step, gpu: Gpu) -> float:
    """The larger of the step's arithmetic at peak and its minimal traffic at peak, microseconds. Raises UserError for missing units."""
    return step_us(step, gpu, Assumptions(1.0, 1.0, 0.0))


def step_us(step: Step, gpu: Gpu, given: Assumptions) -> float:
    """Time of a step under assumptions, microseconds."""
    peak = gpu.tflops[_units(step)]
    if step.flops and not peak:
        raise UserError(f"{gpu.name} has no {_units(step)} units, which {step.label} needs; choose another GPU or precision")
    arithmetic = step.flops / (peak * given.products * 1e6) if step.flops else 0.0
    traffic = (step.read_bytes + step.write_bytes) / (gpu.terabytes * given.memory * 1e6)
    return max(arithmetic, traffic) + given.gap_us


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


def by_operation(steps: Iterable[Step], gpu: Gpu) -> list[tuple[str, int, int, int, float]]:
    """(operation, count, bytes, FLOPs, floor in microseconds) summed over blocks, the costliest first."""
    rows: dict[str, list[float]] = {}
    for step in steps:
        parts = step.label.split(".")
        name = ".".join(parts[2:]) if parts[0] == "blocks" and len(parts) > 2 else step.label
        row = rows.setdefault(name, [0, 0, 0, 0.0])
        for i, value in enumerate((1, step.read_bytes + step.write_bytes, step.flops, floor_us(step, gpu))):
            row[i] += value
    return sorted(((n, int(r[0]), int(r[1]), int(r[2]), r[3]) for n, r in rows.items()), key=lambda row: -row[4])

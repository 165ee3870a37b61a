"""Time of every launch of a program, in place: a graph of the program with a timestamp between any two launches."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from sanawm_export.cuda.cost import Gpu, floor_us, operation_class, operation_name
from sanawm_runtime.engines._cuda_device import Gpu as Device
from sanawm_runtime.engines._cuda_device import Timestamp
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.engines.cuda import CudaEngine

COPY_BYTES = 1 << 30
# Timestamps in a row, whose distance is what measuring adds to a launch.
EMPTY = 64


@dataclass(frozen=True)
class Operation:
    """Launches of one operation, summed over the blocks of a kind.

    `kind`: its class in the cost model; `us`: sum of their median times; `floor_us`: of their bounds; `least_us` and `most_us`: the sums of the
    fastest and the slowest of each launch.
    """

    name: str
    kernel: str
    kind: str
    count: int
    us: float
    least_us: float
    most_us: float
    floor_us: float


def step_times(engine: CudaEngine, program: str, buffers: Mapping[str, Buffer], runs: int) -> list[list[float]]:
    """Microseconds of each launch or copy, once a run, less what a timestamp costs."""
    bound, stream = engine.steps(program, buffers)
    device, marks = engine.device, []
    with device.record(stream) as made:
        for _ in range(EMPTY):
            marks.append(Timestamp(device, stream))
        for step in bound:
            step.enqueue(device, stream)
            marks.append(Timestamp(device, stream))
    times: list[list[float]] = [[] for _ in range(len(bound))]
    for _ in range(runs + 1):
        device.call("cuGraphLaunch", made[0], stream)
        device.call("cuStreamSynchronize", stream)
        distances = [b.since(a) * 1e6 for a, b in itertools.pairwise(marks)]
        empty = statistics.median(distances[: EMPTY - 1])
        for found, value in zip(times, distances[EMPTY - 1 :]):
            found.append(max(value - empty, 0.0))
    device.drop(made[0])
    return [found[1:] for found in times]


def operations(plan: Plan, times: list[list[float]], gpu: Gpu, softmax: frozenset[int] = frozenset()) -> list[Operation]:
    """Sums over the blocks of a kind, the costliest first. `softmax`: the transformer's blocks with softmax attention.

    Where blocks have different kernels for one operation, since the clean pass has few rows in its last block, the sum is over all and names them.
    """
    found: dict[str, Operation] = {}
    for step, values in zip(plan.steps, times, strict=True):
        kernel = step.kernel if isinstance(step, Launch) else "copy"
        name = operation_name(step.label)
        if step.label.startswith("blocks."):
            name = f"{'softmax' if int(step.label.split('.')[1]) in softmax else 'gdn'}.{name}"
        elif plan.program.startswith("decode"):
            name = kernel  # the decoder's blocks have shapes of their own, and kernels are named by these
        kind = operation_class(step)
        old = found.get(name, Operation(name, kernel, kind, 0, 0.0, 0.0, 0.0, 0.0))
        kernels = old.kernel if kernel in old.kernel.split(" and ") else f"{old.kernel} and {kernel}"
        found[name] = Operation(
            name, kernels, kind, old.count + 1, old.us + statistics.median(values), old.least_us + min(values), old.most_us + max(values),
            old.floor_us + floor_us(step, gpu),
        )  # fmt: skip
    return sorted(found.values(), key=lambda operation: -operation.us)


def copy_bandwidth(device: Device, runs: int = 20) -> float:
    """Bytes a second of a large copy on the device, read and write counted."""
    stream = device.stream
    source, target = (device.allocate(COPY_BYTES, "a copy") for _ in range(2))
    try:
        device.call("cuMemsetD8Async", source, 77, COPY_BYTES, stream)
        seconds = []
        for _ in range(runs):
            begin = Timestamp(device, stream)
            device.copy(target, source, COPY_BYTES)
            end = Timestamp(device, stream)
            device.synchronize()
            seconds.append(end.since(begin))
    finally:
        device.free(source)
        device.free(target)
    return 2 * COPY_BYTES / statistics.median(seconds)

"""benchmarks/engine_calibrated.py on a small world: a calibrated FP8 bundle whose launches are run by Triton's interpreter, beside the torch models.

Prints, as JSON, the rows and the bundle's programs. Runs in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import cuda_fake
import cuda_worlds
import engine_calibrated
from cuda_interpreted import interpreter

from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.synth import synthesize
from sanawm_calibration import run
from sanawm_export.cuda import build
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.quant.interpreter import exact
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines.cuda import CudaEngine

# First and second chunk.
FRAMES = 33
# Kernels of the bundle by name.
variants: dict[str, KernelVariant] = {}


def by_name(found: Mapping[str, KernelVariant], target: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    variants.update(found)
    return ((cuda_fake.index_entry(variant, "sm_90"), name.encode()) for name, variant in found.items())


def opened(bundle: Bundle) -> CudaEngine:
    """An engine on a driver that interprets kernels."""
    entries = {entry["name"].encode(): entry for entry in json.loads(bundle.read("kernels/index.json"))["kernels"]}
    plans = [Plan.from_json(bundle.read(entry.file)) for entry in bundle.manifest.programs.values()]
    writes = {step.kernel: step.writes for plan in plans for step in plan.steps if isinstance(step, Launch)}
    drivers: list[cuda_fake.FakeDriver] = []
    drivers.append(cuda_fake.FakeDriver(entries, writes, interpreter(SimpleNamespace(variants=variants), drivers)))
    return CudaEngine(bundle, Gpu(driver=drivers[0]))


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    checkpoint = synthesize(folder / "checkpoint", cuda_worlds.small_world())
    calibration = folder / "calibration.json"
    run.run(run.Request(open_checkpoint(checkpoint), output=calibration, clips=1, chunks=3, rows=1), lambda *_: None)
    # Kernels without Gluon, which has no interpreter.
    build.capability_number = lambda request, formats: 0
    build.compiled = by_name
    engine_calibrated.CudaEngine = opened  # type: ignore[misc,assignment]
    options = argparse.Namespace(checkpoint=checkpoint, calibration=calibration, precision="fp8", target="h200", frames=FRAMES, seed=0, device="cpu")
    with exact():
        rows = engine_calibrated.measure(options, folder)
    print(json.dumps({"rows": rows, "programs": sorted(Bundle.open(folder / "bundle").manifest.programs)}))


if __name__ == "__main__":
    main()

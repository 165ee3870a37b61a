"""The process that builds one engine: `python -m sanawm_export.tensorrt.worker JOB.json`.

A process of its own gives the memory back, keeps a crash of the library from taking the build along, and starts with the library's folder on
the loader's path, which the ONNX parser needs. It prints one JSON line: the result, or {"error": sentence} with exit status 2.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sanawm.errors import UserError
from sanawm_export.tensorrt import audit, network
from sanawm_export.tensorrt.job import Built, Job
from sanawm_export.tensorrt.plan import READABLE, read_plan
from sanawm_runtime.engines._trt_library import logger, open_library

_PR_SET_PDEATHSIG = 1


def build(job: Job) -> Built:
    """Build, read back and audit one engine. Raises UserError; a file at `job.out` is complete only when this returns."""
    started = time.perf_counter()
    library = open_library(job.engine)
    parsed = network.parse(library, job.graph.read_bytes(), job.folder, plugins=job.plugins)
    network.check_signature(library, parsed, job.program.inputs, job.program.outputs)
    config = network.configure(library, parsed, job.capability, job.options)
    network.use_timing_cache(library, config, job.timing_cache)
    digest = hashlib.sha256()
    with open(job.out, "xb") as file:

        def write(data: memoryview) -> None:
            file.write(data)
            digest.update(data)

        network.serialize(library, parsed, config, write)
    network.keep_timing_cache(library, config, job.timing_cache)
    seconds, size = time.perf_counter() - started, job.out.stat().st_size
    common: dict[str, Any] = {"seconds": seconds, "size": size, "sha256": digest.hexdigest(), "library": library.title}
    warnings = tuple(dict.fromkeys(logger(library)[1].take()))
    if (library.engine, library.version) not in READABLE:
        return Built(**common, peak_rss=_peak(), warnings=warnings)
    plan = read_plan(job.out)
    wanted = job.capability.replace("_", "")
    if plan.accelerators != (wanted,):
        raise UserError(f"{job.program.name}: the engine is compiled for {', '.join(plan.accelerators)}, expected {wanted}; report this")
    if wrong := sorted(set(plan.cubins) - {job.capability}):
        raise UserError(f"{job.program.name}: the engine carries kernels for {', '.join(wrong)}, expected {job.capability}; report this")
    rows = tuple(audit.audit(job.asked, plan))
    audit.require_agreement(job.program.name, rows)
    return Built(
        **common, peak_rss=_peak(), audited=True, rows=rows, device_memory=plan.device_memory,
        weight_bytes=plan.weight_bytes, gemms=len(plan.gemms), attentions=plan.attentions,
        functions=plan.functions, plugins=plan.plugins, cubins=tuple(sorted(set(plan.cubins))), warnings=warnings,
    )  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _die_with_parent() -> None:
    """End when the build that wanted this engine ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then stops its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get("SANAWM_BUILD_PARENT", os.getppid())):
            os._exit(1)


def main(arguments: list[str]) -> int:
    _die_with_parent()
    try:
        built = build(Job.from_json(Path(arguments[0]).read_text()))
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    print(built.to_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

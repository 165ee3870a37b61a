"""Checkpoint -> bundles of TensorRT engines, for one or several targets at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sanawm.errors import UserError
from sanawm.programs import Geometry, Program, programs
from sanawm.schedule import first_chunk_frames
from sanawm_export.build import PROMPT_FILE, TOKENIZER_FILE, BuildRequest, Progress, add_prompt, manifest_of, open_prompt, program_entry
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.tensorrt import report
from sanawm_export.tensorrt.cache import Cached, EngineCache, default_directory, sources_digest
from sanawm_export.tensorrt.euler import euler_programs
from sanawm_export.tensorrt.graphs import PLAIN, GraphSource, graph_source
from sanawm_export.tensorrt.job import Job
from sanawm_export.tensorrt.kernels import KernelCompiler
from sanawm_export.tensorrt.lower import Lowering
from sanawm_export.tensorrt.lowering import GDN
from sanawm_export.tensorrt.network import BuildOptions
from sanawm_export.tensorrt.processes import BuildProcesses
from sanawm_runtime.bundle import Bundle, Manifest, PrecisionEntry, ProgramEntry
from sanawm_runtime.device import device_capability
from sanawm_runtime.engines._trt_library import Library, open_library

ENGINES_FOLDER = "engines"
REPORT_FILE = "build-report.json"
# Versions of these decide what a graph and its kernels are.
_TOOLS = ("torch", "triton", "onnx", "onnx-ir", "onnxscript", "numpy", "nvidia-modelopt")


@dataclass(frozen=True)
class TensorRTOptions:
    """How bundles are built.

    gdn: "plugin" puts our kernels into the engines, "matmul" lowers the recurrent blocks to plain products. calibration: the file of
    `sanawm calibrate`, which quantized precisions need. cache: where finished engines are kept between builds (None: nowhere). memory and
    processes bound how many engines are built at a time. check: compare an exported graph with the torch model first.
    """

    gdn: GDN = "plugin"
    calibration: Path | None = None
    cache: Path | None = field(default_factory=default_directory)
    engine: BuildOptions = field(default_factory=BuildOptions)
    memory: int | None = None
    processes: int | None = None
    check: bool = False


def build_tensorrt(
    request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None, options: TensorRTOptions | None = None
) -> Bundle:
    """Write a bundle of engines for `request.engine` ("tensorrt_rtx" or "tensorrt"). Raises UserError; leaves a whole bundle or what was there.

    TensorRT-RTX builds for its targets on any machine; TensorRT builds for the GPU of the machine it runs on.
    """
    return build_tensorrt_targets([(request, out)], overwrite=overwrite, progress=progress, options=options)[0]


def build_tensorrt_targets(
    requests: Sequence[tuple[BuildRequest, Path]],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    options: TensorRTOptions | None = None,
) -> list[Bundle]:
    """Bundles of one checkpoint and precision for several targets; graphs are exported once. Raises UserError."""
    chosen = options or TensorRTOptions()
    first = requests[0][0]
    for request, _ in requests:
        _check(request, first)
    library = open_library(first.engine)  # type: ignore[arg-type]
    _check_machine(library, [request for request, _ in requests])
    first.checkpoint.check()
    tokens = open_prompt(first.checkpoint).max_length
    config = first.checkpoint.world
    geometry = Geometry(config, tokens, first_chunk_frames(first.latent_frames, config.stream.chunk_frames), PLAIN.get(first.precision, "bfloat16"))
    source = graph_source(first.checkpoint, geometry, first.precision, chosen.calibration, merge=chosen.gdn == "plugin")
    for request, _ in requests:
        for arithmetic in sorted(source.formats):
            request.target.require(request.engine, arithmetic)
    parity = source.check() if chosen.check else None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(BundleWriter(out, overwrite=overwrite)) for _, out in requests]
        # Inside what the next build removes should this one be killed.
        scratch = writers[0].partial / "scratch"
        scratch.mkdir()
        cache = EngineCache(chosen.cache or scratch / "cache")
        processes = stack.enter_context(BuildProcesses(library, scratch, chosen.memory, chosen.processes))
        facts = _facts(first) | source.facts()
        targets = [_Target(r, writer, _lowering(stack, library, r, chosen, cache)) for (r, _), writer in zip(requests, writers, strict=True)]
        _Run(source, cache, processes, targets, facts, progress).run(scratch)
        for target in targets:
            target.collect(geometry, "link" if chosen.cache else "copy")
        shutil.rmtree(scratch)
        return [target.finish(library, source, parity) for target in targets]


def _check(request: BuildRequest, first: BuildRequest) -> None:
    same = (request.checkpoint.source, request.precision, request.latent_frames, request.engine)
    if same != (first.checkpoint.source, first.precision, first.latent_frames, first.engine):
        raise UserError("targets built together share checkpoint, precision, clip length and engine; build the others in a call of their own")
    if request.target.capability is None:
        raise UserError(f"{request.engine} builds for GPUs, found target {request.target.name}; use --engine onnxruntime for it")


def _check_machine(library: Library, requests: Sequence[BuildRequest]) -> None:
    if library.ahead_of_time:
        return
    here = device_capability()
    for request in requests:
        if request.target.capability != here:
            found = f"the GPU here is {here}" if here else "no NVIDIA GPU was found here"
            raise UserError(f"{library.title} builds for the GPU it runs on, and {found}; build where there is a {request.target.name}")


def _lowering(stack: contextlib.ExitStack, library: Library, request: BuildRequest, options: TensorRTOptions, cache: EngineCache) -> Lowering:
    capability = request.target.capability
    assert capability is not None
    compiler = stack.enter_context(KernelCompiler(capability, options.processes))
    return Lowering(library, capability, options.gdn, compiler, options.engine, cache.timing_file(library.engine, library.version, capability))


def _facts(request: BuildRequest) -> dict[str, Any]:
    return {
        "checkpoint": request.checkpoint.fingerprint(), "world": request.checkpoint.world.to_json(), "sources": sources_digest(),
        "tools": tool_versions(),
    }  # fmt: skip


def tool_versions() -> dict[str, str]:
    """Installed versions of what turns a checkpoint into graphs and kernels."""
    found = {}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[tool] = importlib.metadata.version(tool)
    return found


@dataclass
class _Target:
    """One bundle in the making."""

    request: BuildRequest
    writer: BundleWriter
    lowering: Lowering
    engines: dict[str, Cached] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    entries: dict[str, ProgramEntry] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def collect(self, geometry: Geometry, how: Any) -> None:
        """Put the engines, the tokenizer and the report into the bundle."""
        table = {**programs(geometry), **euler_programs(geometry)}
        self.engines = {name: self.engines[name] for name in table}
        for name, cached in self.engines.items():
            file = f"{ENGINES_FOLDER}/{name}.engine"
            self.writer.add_file(file, cached.file, how)
            extras = report.program_extras(cached)
            if name == "text_encoder":
                extras |= {"tokenizer": TOKENIZER_FILE, "prompt": PROMPT_FILE}
            self.entries[name] = program_entry(table[name], file, extras)
        add_prompt(self.writer, self.request.checkpoint)

    def finish(self, library: Library, source: GraphSource, parity: dict[str, Any] | None) -> Bundle:
        """Write report and manifest, and put the bundle in place."""
        built = report.build_report(library, time.perf_counter() - self.started, self.engines, self.reused)
        self.writer.add_bytes(REPORT_FILE, (json.dumps(built, indent=1) + "\n").encode())
        summary = report.precision_summary(source.geometry.dtype, self.engines)
        precision = PrecisionEntry(self.request.precision, summary)
        manifest: Manifest = manifest_of(self.request, self.entries, precision, report.unverified(library, self.request.target.name, summary))
        versions = manifest.versions | tool_versions() | {library.engine: library.version}
        return self.writer.finish(dataclasses.replace(manifest, versions=versions, calibration=source.summary(), parity=parity))


@dataclass
class _Run:
    """Every engine of every target: from the cache, or exported, lowered and built."""

    source: GraphSource
    cache: EngineCache
    processes: BuildProcesses
    targets: Sequence[_Target]
    facts: dict[str, Any]
    progress: Progress | None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: int = 0

    def run(self, scratch: Path) -> None:
        wanted: dict[str, list[_Target]] = {}
        for target in self.targets:
            for name, program in self.source.table.items():
                cached = self.cache.recall(target.lowering.request_key(program, self.facts))
                if cached is None:
                    wanted.setdefault(name, []).append(target)
                else:
                    self._take(target, name, cached, reused=True)
        waiting = []
        for program, path in self.source.export(wanted, scratch):
            self._say(f"lowering {program.name}")
            for target in wanted[program.name]:
                waiting.append(self._start(target, program, path, scratch))
            self._failed_early(waiting)
        for future in concurrent.futures.as_completed([f for f in waiting if f is not None]):
            future.result()

    def _start(self, target: _Target, program: Program, path: Path, scratch: Path) -> concurrent.futures.Future[None] | None:
        job, key, extras = target.lowering.job(program, path, scratch, self.source.recipe(program.name))
        request = target.lowering.request_key(program, self.facts)
        cached = self.cache.find(key)
        if cached is not None:
            self.cache.remember(request, key)
            self._take(target, program.name, cached, reused=True)
            return None
        return self.processes.submit(job, lambda built: self._finish(target, job, key, request, extras, built))

    def _finish(self, target: _Target, job: Job, key: str, request: str, extras: dict[str, Any], built: Any) -> None:
        """In a thread of the pool, so that a finished engine is in the cache whatever happens to the build."""
        cached = self.cache.add(key, job.out, built, extras)
        self.cache.remember(request, key)
        job.graph.unlink(missing_ok=True)
        self._take(target, job.program.name, cached, reused=False)

    def _take(self, target: _Target, name: str, cached: Cached, *, reused: bool) -> None:
        with self._lock:
            target.engines[name] = cached
            if reused:
                target.reused.add(name)
            self._done += 1
        self._say(f"{name} for {target.request.target.name}")

    def _say(self, what: str) -> None:
        if self.progress:
            self.progress(what, self._done, len(self.targets) * len(self.source.table))

    def _failed_early(self, waiting: Sequence[concurrent.futures.Future[None] | None]) -> None:
        for future in waiting:
            if future is not None and future.done():
                future.result()

"""Checkpoint -> bundle, for every target."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import sanawm
from sanawm.errors import CheckpointError, UserError
from sanawm.model.checkpoint import Checkpoint
from sanawm.programs import PARTS, Geometry, Program, programs
from sanawm.prompt import PromptTokenizer
from sanawm.schedule import first_chunk_frames
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.onnx.export import ExportedProgram, export_part
from sanawm_export.parts import load_part
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, ProgramEntry, TargetEntry, TensorEntry
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.targets import Target

PRECISION_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PROGRAMS_FOLDER = "programs"
TOKENIZER_FILE, PROMPT_FILE = "prompt/tokenizer.json", "prompt/prompt.json"
_REPORTED = ("torch", "triton", "onnx", "onnxscript", "transformers", "onnxruntime", "nvidia-modelopt")

# program name, index from 1, programs in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildRequest:
    """What to build and from what.

    `latent_frames` fixes the first chunk's length by its remainder (clips of 24k + 1 frames have 3k + 1 latent frames). `calibration` (the file
    of `sanawm calibrate`) is for the TensorRT and CUDA engines, `gdn` ("plugin" or "matmul") for TensorRT.
    """

    checkpoint: Checkpoint
    target: Target
    engine: str
    precision: str
    latent_frames: int = 121
    calibration: Path | None = None
    gdn: str = "plugin"
    check: bool = False


def open_prompt(checkpoint: Checkpoint) -> PromptTokenizer:
    """The checkpoint's tokenizer with its instruction prefix. Raises CheckpointError without a tokenizer."""
    if checkpoint.tokenizer_file is None:
        raise CheckpointError(f"{checkpoint.source} has no tokenizer.json; give the text encoder's folder with --text-encoder")
    return PromptTokenizer.from_file(checkpoint.tokenizer_file, checkpoint.chi_prompt, checkpoint.world.dit.text_tokens)


def geometry_of(request: BuildRequest, prompt: PromptTokenizer) -> Geometry:
    """Shapes and activation dtype of a build."""
    config = request.checkpoint.world
    first = first_chunk_frames(request.latent_frames, config.stream.chunk_frames)
    return Geometry(config, prompt.max_length, first, PRECISION_DTYPES[request.precision])


def build_onnxruntime(request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
    """Write a bundle of ONNX graphs for ONNX Runtime's CPU provider. Raises UserError; leaves a whole bundle at `out` or what was there."""
    checkpoint = request.checkpoint
    if request.precision not in PRECISION_DTYPES:
        raise UserError(f"the onnxruntime engine computes {' or '.join(PRECISION_DTYPES)}, found --precision {request.precision}")
    checkpoint.check()
    prompt = open_prompt(checkpoint)
    geometry = geometry_of(request, prompt)
    parity = _check(request, geometry) if request.check else None
    total = len(programs(geometry))
    done = 0

    def starting(name: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(name, done, total)

    entries: dict[str, ProgramEntry] = {}
    with BundleWriter(out, overwrite=overwrite) as writer:
        folder = writer.partial / PROGRAMS_FOLDER
        folder.mkdir()
        for name in PARTS:
            part = load_part(checkpoint, name, getattr(torch, geometry.dtype))
            for exported in export_part(name, part, geometry, folder, cpu=True, on_program=starting):
                entries[exported.program.name] = _entry(exported)
                writer.path_for(f"{PROGRAMS_FOLDER}/{exported.file}")
            writer.path_for(f"{PROGRAMS_FOLDER}/{exported.weights}")
            del part
        add_prompt(writer, checkpoint)
        precision = PrecisionEntry(request.precision, {"activations": geometry.dtype, "weights": geometry.dtype})
        return writer.finish(dataclasses.replace(manifest_of(request, entries, precision), parity=parity))


def _check(request: BuildRequest, geometry: Geometry) -> dict[str, Any]:
    from sanawm_export.tensorrt.graphs import GraphSource

    return GraphSource(request.checkpoint, geometry, request.precision).check()


def add_prompt(writer: BundleWriter, checkpoint: Checkpoint) -> None:
    """The tokenizer and the instruction prefix, which the runtime composes prompts with."""
    assert checkpoint.tokenizer_file is not None
    writer.add_file(TOKENIZER_FILE, checkpoint.tokenizer_file)
    writer.add_bytes(PROMPT_FILE, json.dumps({"chi": checkpoint.chi_prompt}).encode())


def _entry(exported: ExportedProgram) -> ProgramEntry:
    extras: dict[str, object] = {"weights": f"{PROGRAMS_FOLDER}/{exported.weights}"}
    if exported.program.name == "text_encoder":
        extras |= {"tokenizer": TOKENIZER_FILE, "prompt": PROMPT_FILE}
    return program_entry(exported.program, f"{PROGRAMS_FOLDER}/{exported.file}", extras)


def program_entry(program: Program, file: str, extras: dict[str, object]) -> ProgramEntry:
    """A program's row of the manifest."""
    sides = [tuple(TensorEntry(t.name, t.dtype, t.shape) for t in side) for side in (program.inputs, program.outputs)]  # type: ignore[arg-type]
    return ProgramEntry(file, sides[0], sides[1], extras)


def manifest_of(
    request: BuildRequest, entries: dict[str, ProgramEntry], precision: PrecisionEntry, unverified: tuple[str, ...] = ()
) -> Manifest:
    """The manifest of a build; the writer fills in the files."""
    checkpoint, target = request.checkpoint, request.target
    return Manifest(
        name=checkpoint.world.name,
        created=utc_now(),
        config=checkpoint.world,
        target=TargetEntry(target.name, request.engine, target.capability),  # type: ignore[arg-type]
        precision=precision,
        programs=entries,
        files={},
        versions={"sanawm": sanawm.__version__, **{p: importlib.metadata.version(p) for p in _REPORTED if _installed(p)}},
        checkpoint=CheckpointEntry(checkpoint.source, checkpoint.kind, checkpoint.commit, checkpoint.fingerprint()),
        unverified=unverified,
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


Requests = Sequence[tuple[BuildRequest, Path]]
TargetsBuilder = Callable[[Requests, bool, Progress | None], list[Bundle]]


class Builder(Protocol):
    """Writes a bundle for one target."""

    def __call__(self, request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle: ...


@dataclass(frozen=True)
class EngineBuilder:
    """An engine's builder of one checkpoint and precision for several targets, and the precision it builds by default."""

    build: TargetsBuilder
    default_precision: str


def build_bundles(requests: Requests, *, overwrite: bool = False, progress: Progress | None = None) -> list[Bundle]:
    """Bundles of one checkpoint for several targets, in the order of `requests`. Raises UserError; each bundle is whole or not there.

    TensorRT targets of one precision are built together: graphs are exported once, and engines are built in parallel as memory allows.
    """
    together: dict[tuple[str, str], list[int]] = {}
    for index, (request, _) in enumerate(requests):
        together.setdefault((request.engine, request.precision), []).append(index)
    bundles: dict[int, Bundle] = {}
    for (engine, _), indices in together.items():
        made = BUILDERS[engine].build([requests[i] for i in indices], overwrite, progress)
        bundles.update(zip(indices, made, strict=True))
    return [bundles[i] for i in range(len(requests))]


def _build_cuda(request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
    from sanawm_export.cuda.build import build_cuda, build_cuda_synthetic  # imports triton, which the other engines do not need
    from sanawm_export.cuda.synthetic import SyntheticCheckpoint

    if request.check:
        raise UserError("the cuda engine has no exported graph to compare, found --check; leave it out: its plans are compared by the tests")
    if isinstance(request.checkpoint, SyntheticCheckpoint):
        return build_cuda_synthetic(request, out, request.checkpoint.seed, overwrite=overwrite, progress=progress)
    return build_cuda(request, out, overwrite=overwrite, progress=progress)


def _build_tensorrt(requests: Requests, overwrite: bool, progress: Progress | None) -> list[Bundle]:
    from sanawm_export.tensorrt.build import TensorRTOptions, build_tensorrt_targets  # needs the library, which the other engines do not

    first = requests[0][0]
    options = TensorRTOptions(gdn=first.gdn, calibration=first.calibration, check=first.check)  # type: ignore[arg-type]
    return build_tensorrt_targets(requests, overwrite=overwrite, progress=progress, options=options)


def _one_by_one(build: Builder) -> TargetsBuilder:
    return lambda requests, overwrite, progress: [build(request, out, overwrite=overwrite, progress=progress) for request, out in requests]


# Engines this version can build, by the names of the target table.
BUILDERS: dict[str, EngineBuilder] = {
    "onnxruntime": EngineBuilder(_one_by_one(build_onnxruntime), "fp32"),
    "tensorrt_rtx": EngineBuilder(_build_tensorrt, "bf16"),
    "tensorrt": EngineBuilder(_build_tensorrt, "bf16"),
    "cuda": EngineBuilder(_one_by_one(_build_cuda), "bf16"),
}

"""Checkpoint -> bundle, for every target."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
_REPORTED = ("torch", "onnx", "onnxscript", "transformers", "onnxruntime")

# program name, index from 1, programs in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildRequest:
    """What to build and from what.

    `latent_frames` fixes the first chunk's length by its remainder (clips of 24k + 1 frames have 3k + 1 latent frames). `calibration` (the file
    of `sanawm calibrate`) and `gdn` ("plugin" or "matmul") are for the TensorRT engines.
    """

    checkpoint: Checkpoint
    target: Target
    engine: str
    precision: str
    latent_frames: int = 121
    calibration: Path | None = None
    gdn: str = "plugin"


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
        return writer.finish(manifest_of(request, entries, precision))


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


class Builder(Protocol):
    """Writes a bundle for one engine."""

    def __call__(self, request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle: ...


@dataclass(frozen=True)
class EngineBuilder:
    """An engine's builder and the precision it builds by default."""

    build: Builder
    default_precision: str


def _build_cuda(request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
    from sanawm_export.cuda.build import build_cuda  # imports triton, which the other engines do not need

    return build_cuda(request, out, overwrite=overwrite, progress=progress)


def _build_tensorrt(request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bundle:
    from sanawm_export.tensorrt.build import TensorRTOptions, build_tensorrt  # needs the library, which the other engines do not

    options = TensorRTOptions(gdn=request.gdn, calibration=request.calibration)  # type: ignore[arg-type]
    return build_tensorrt(request, out, overwrite=overwrite, progress=progress, options=options)


# Engines this version can build, by the names of the target table.
BUILDERS: dict[str, EngineBuilder] = {
    "onnxruntime": EngineBuilder(build_onnxruntime, "fp32"),
    "tensorrt_rtx": EngineBuilder(_build_tensorrt, "bf16"),
    "tensorrt": EngineBuilder(_build_tensorrt, "bf16"),
    "cuda": EngineBuilder(_build_cuda, "bf16"),
}

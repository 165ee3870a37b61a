"""Bundles for the CUDA engine: launch plans, compiled kernels, packed weights."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sanawm.errors import CheckpointError, UserError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.checkpoint.checkpoint import text_shapes
from sanawm.model.checkpoint.tiny_tokenizer import CHI_PROMPT, build_tokenizer
from sanawm.model.dit import SanaWM
from sanawm.programs import Geometry, Program, TensorSpec, programs
from sanawm.prompt import PromptTokenizer
from sanawm.schedule import first_chunk_frames
from sanawm_export.build import PROMPT_FILE, TOKENIZER_FILE, BuildRequest, Progress, add_prompt, manifest_of, open_prompt, program_entry
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.cuda.calibrated import CalibratedRecipe, build_formats
from sanawm_export.cuda.formats import ASSUMED_AMAX, Formats
from sanawm_export.cuda.lower import PARTS, lower_parts
from sanawm_export.cuda.tape import Lowered
from sanawm_export.cuda.text_weights import check_text_settings
from sanawm_export.parts import load_part
from sanawm_kernels.aot import compile as compiler
from sanawm_kernels.aot.build import cache_directory
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime.bundle import Bundle, PrecisionEntry, ProgramEntry
from sanawm_runtime.engines._cuda_pack import Packed, Read

KERNEL_INDEX = "kernels/index.json"
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
# Compiled with this version of PTX, kernels load on drivers since CUDA 12.8.
PTX_VERSION = 87
# Architecture whose kernels `benchmarks/results` has measured.
MEASURED_ON = "sm_90"
_NVFP4_CAPABILITIES = ("sm_120", "sm_121")


def build_cuda(
    request: BuildRequest, out: Path, *, overwrite: bool = False, progress: Progress | None = None, parts: Collection[str] = PARTS
) -> Bundle:
    """Write a bundle of all programs and the Euler step for one architecture; needs no GPU.

    With fewer `parts` it has only their programs: good for measuring them, not for a clip. Raises UserError; leaves a whole bundle at `out` or
    what was there.
    """
    request.checkpoint.check()
    prompt = open_prompt(request.checkpoint)
    check_text_settings(text_folder(request.checkpoint))
    choice = build_formats(request.checkpoint, request.precision, request.calibration)

    def add_weights(writer: BundleWriter, part: str, tensors: Sequence[Packed]) -> dict[str, Any]:
        file = f"weights/{part}.safetensors"
        recipe = choice[1]
        # Loading the model for a recipe that quantizes nothing would be in vain.
        given = _quantized(request, recipe, progress) if part == "dit" and recipe is not None and recipe.found.layers else {}
        write_packed(writer, file, tensors, _reader(request, part), given)
        return {"file": file}

    def add_more(writer: BundleWriter) -> None:
        add_prompt(writer, request.checkpoint)

    return write_bundle(request, out, prompt.max_length, choice, add_weights, add_more, overwrite=overwrite, progress=progress, parts=parts)


def build_cuda_synthetic(
    request: BuildRequest, out: Path, seed: int, *, overwrite: bool = False, progress: Progress | None = None
) -> Bundle:
    """The same without weights: the bundle names the seed, and the runtime makes the weights of the synthetic checkpoint with that seed.

    Its tokenizer is that of synthetic checkpoints.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"expected a seed from 0 to 2**63 - 1, found {seed}; choose another")
    if request.calibration is not None:
        raise UserError("a bundle that makes its weights from a seed cannot hold calibrated ones; use `sanawm checkpoint synth` for --calibration")
    choice = build_formats(request.checkpoint, request.precision, None)
    world = request.checkpoint.world
    tokenizer, chi = build_tokenizer(world.text.vocab), "\n".join(CHI_PROMPT)
    stored = tokenizer.to_str().encode()
    prompt = PromptTokenizer(tokenizer, chi, world.dit.text_tokens)

    def add_more(writer: BundleWriter) -> None:
        writer.add_bytes(TOKENIZER_FILE, stored)
        writer.add_bytes(PROMPT_FILE, json.dumps({"chi": chi}).encode())

    return write_bundle(request, out, prompt.max_length, choice, lambda *_: {"seed": seed}, add_more, overwrite=overwrite, progress=progress)


def text_folder(checkpoint: Checkpoint) -> Path:
    """Folder of the checkpoint's text encoder. Raises CheckpointError where there is none."""
    if checkpoint.text_dir is None:
        raise CheckpointError(f"{checkpoint.source} has no text encoder; give the Gemma-2 one with --text-encoder")
    return checkpoint.text_dir


def _reader(request: BuildRequest, part: str) -> Read:
    """Tensors of a part of the checkpoint in float32. The transformer's last few are kept, since they may be packed twice."""
    checkpoint = request.checkpoint
    if part == "text":
        stored, names = text_shapes(text_folder(checkpoint))
        return lambda name, shape: stored.get(names[name]).float().numpy().reshape(shape)
    if part != "dit":
        tensors = checkpoint.load_vae("decoder" if part == "vae" else "encoder")
        return lambda name, shape: tensors[name].float().numpy().reshape(shape)
    kept: dict[str, NDArray[np.float32]] = {}

    def read(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name not in kept:
            if len(kept) >= 8:
                kept.pop(next(iter(kept)))
            kept[name] = next(iter(checkpoint.iter_dit(names=[name])))[1].float().numpy()
        return kept[name].reshape(shape)

    return read


def _quantized(request: BuildRequest, recipe: CalibratedRecipe, progress: Progress | None) -> dict[str, NDArray[np.uint8]]:
    """Bytes of the transformer's calibrated weights by packed name, from the weights in the activations' dtype."""
    model = load_part(request.checkpoint, "dit", torch.bfloat16)
    assert isinstance(model, SanaWM)

    def advance(name: str, done: int, total: int) -> None:
        if progress:
            progress(name, done + 1, total)

    return recipe.quantize(model, advance)


def write_packed(
    writer: BundleWriter, name: str, tensors: Sequence[Packed], read: Read, given: Mapping[str, NDArray[np.uint8]] | None = None
) -> None:
    """Pack every tensor into one safetensors file, one at a time. `given` has the bytes of those that were calibrated."""
    header, offset = {}, 0
    for packed in tensors:
        header[packed.name] = {"dtype": _SAFETENSORS[packed.dtype], "shape": list(packed.shape), "data_offsets": [offset, offset + packed.nbytes]}
        offset += packed.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writer.create(name) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for packed in tensors:
            data = given[packed.name] if given and packed.op == "calibrated" else packed.make(read).reshape(-1).view(np.uint8)
            if data.nbytes != packed.nbytes:
                raise ValueError(f"{packed.name}: expected {packed.nbytes} bytes, found {data.nbytes}")
            file.write(data.data)


def capability_number(request: BuildRequest, formats: Formats) -> int:
    """90 for sm_90. Raises UserError for a target that the engine does not serve in these formats."""
    capability = request.target.capability
    if capability is None:
        raise UserError(f"the cuda engine needs a GPU target, found {request.target.name}; use --engine onnxruntime")
    if formats.uses("nvfp4") and capability not in _NVFP4_CAPABILITIES:
        served = " and ".join(_NVFP4_CAPABILITIES)
        raise UserError(f"the cuda engine has NVFP4 kernels for {served}, and {request.target.name} is {capability}; use --precision fp8")
    number = int(capability.removeprefix("sm_"))
    if formats.uses("fp8") and number < 89:
        raise UserError(f"{request.target.name} has no FP8 tensor cores; use --precision bf16")
    return number


AddWeights = Callable[[BundleWriter, str, Sequence[Packed]], dict[str, Any]]


def write_bundle(
    request: BuildRequest,
    out: Path,
    prompt_tokens: int,
    choice: tuple[Formats, CalibratedRecipe | None],
    add_weights: AddWeights,
    add_more: Callable[[BundleWriter], None],
    *,
    overwrite: bool,
    progress: Progress | None,
    parts: Collection[str] = PARTS,
) -> Bundle:
    """Lower, compile and write `parts`; `add_weights` writes a part's weights and says where they are, `add_more` what else belongs there.

    `choice` has the formats and, where they are calibrated, the recipe that they come from.
    """
    formats, recipe = choice
    world, target = request.checkpoint.world, capability_number(request, formats)
    first = first_chunk_frames(request.latent_frames, world.stream.chunk_frames)
    geometry = Geometry(world, prompt_tokens, first, "bfloat16")
    every = lower_parts(geometry, formats, target)
    lowered = {key: every[key] for key in parts}
    signatures = programs(geometry) | euler_programs(geometry)
    entries: dict[str, ProgramEntry] = {}
    with BundleWriter(out, overwrite=overwrite) as writer:
        everything = {name: result for part in lowered.values() for name, result in part.programs.items()}
        _add_kernels(writer, merged_variants(everything), target, progress)
        for key, part in lowered.items():
            if not part.programs:
                continue
            table = f"weights/{key}.json"
            for name, result in part.programs.items():
                file = f"plans/{name}.json"
                writer.add_bytes(file, result.plan.to_json())
                extras: dict[str, object] = {"weights": table, "kernels": KERNEL_INDEX, "arena": result.plan.arena}
                if name == "text_encoder":
                    extras |= {"tokenizer": TOKENIZER_FILE, "prompt": PROMPT_FILE}
                entries[name] = program_entry(signatures[name], file, extras)
            tensors = tuple(part.tensors.values())
            document = {"tensors": [dataclasses.asdict(t) for t in tensors], **add_weights(writer, key, tensors)}
            writer.add_bytes(table, json.dumps(document, separators=(",", ":")).encode())
        add_more(writer)
        summary: dict[str, Any] = {"activations": "bfloat16", "weights": "bfloat16", "products": formats.summary()}
        summary |= recipe.summary() if recipe else {}
        unverified = [
            "These kernels were run on an H200 with random weights; with trained ones nothing has been measured."
            if request.target.capability == MEASURED_ON
            else f"No kernel of this bundle has been run on {request.target.name}; code, plans and packing were checked on a CPU."
        ]
        if recipe is None and formats.uses("nvfp4"):
            unverified.append(f"NVFP4 activations are not calibrated: their largest magnitude is taken to be {ASSUMED_AMAX:g}.")
        manifest = manifest_of(request, entries, PrecisionEntry(request.precision, summary), tuple(unverified))
        return writer.finish(dataclasses.replace(manifest, calibration=recipe.provenance() if recipe else None))


def _add_kernels(writer: BundleWriter, variants: Mapping[str, KernelVariant], target: int, progress: Progress | None) -> None:
    index = []
    for done, (entry, cubin) in enumerate(compiled(variants, target), start=1):
        writer.add_bytes(f"kernels/{entry['file']}", cubin)
        index.append(entry)
        if progress:
            progress(entry["name"], done, len(variants))
    index.sort(key=lambda entry: entry["name"])
    writer.add_bytes(KERNEL_INDEX, json.dumps({"target": f"sm_{target}", "ptx_version": PTX_VERSION, "kernels": index}, indent=1).encode())


def euler_programs(geometry: Geometry) -> dict[str, Program]:
    """Signatures of the Euler step of each chunk length; `latents` are read and written."""
    config, found = geometry.config.dit, {}
    for frames in sorted({geometry.frames("first"), geometry.frames("steady")}):
        shape = (1, config.in_channels, frames, config.height, config.width)
        velocity = TensorSpec("velocity", geometry.dtype, shape, "noise minus clean latents")
        found[f"euler.{frames}"] = Program(f"euler.{frames}", (velocity,), (TensorSpec("latents", geometry.dtype, shape, "updated in place"),))
    return found


def merged_variants(lowered: Mapping[str, Lowered]) -> dict[str, KernelVariant]:
    """Kernel variants of all programs by name; ValueError where one name means two kernels."""
    found: dict[str, KernelVariant] = {}
    for result in lowered.values():
        for name, variant in result.variants.items():
            if found.setdefault(name, variant) != variant:
                raise ValueError(f"two kernels of different programs are named {name}")
    return found


def compiled(variants: Mapping[str, KernelVariant], target: int, jobs: int | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Index entry and cubin of each variant, as they finish; finished ones are kept in the cache directory between builds. Raises UserError."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, len(variants)), context, initializer=compiler.start_worker) as pool:
        waiting = [pool.submit(compiler.in_worker, v, target, PTX_VERSION, str(cache_directory())) for v in variants.values()]
        try:
            for future in concurrent.futures.as_completed(waiting):
                cubin, entry, _ = future.result()
                yield {**entry, "file": f"{entry['name']}.cubin"}, cubin
        except compiler.CompileError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise UserError(f"a kernel does not compile: {error}") from error

"""All programs of a world as ONNX files with shared weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn

from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm.model.vae import VideoVAE
from sanawm.programs import Geometry, Program, programs
from sanawm_export.onnx.cpu import widen_bfloat16
from sanawm_export.onnx.modules import (
    CameraProgram,
    DecodeProgram,
    DiTProgram,
    ImageEncoderProgram,
    Named,
    PromptKVProgram,
    TextEncoderProgram,
)
from sanawm_export.onnx.trace import trace
from sanawm_export.onnx.weights import link_weights, module_tensors, write_weights

_PREFIXES = ("model.", "vae.", "decoder.", "encoder.")


@dataclass(frozen=True)
class ExportedProgram:
    """An ONNX file and the weight file it points into, both in the export directory."""

    program: Program
    file: str
    weights: str


def program_module(program: Program, part: nn.Module) -> Named:
    """The torch module that a program's graph is traced from; `part` is the text encoder, VAE or transformer."""
    name = program.name
    if name == "text_encoder":
        return TextEncoderProgram(program, part)
    if isinstance(part, VideoVAE):
        return ImageEncoderProgram(program, part) if name == "image_encoder" else DecodeProgram(program, part)
    assert isinstance(part, SanaWM)
    if name == "prompt_kv":
        return PromptKVProgram(program, part)
    return CameraProgram(program, part) if name.startswith("camera") else DiTProgram(program, part)


def check_graph(path: Path) -> None:
    """Run the ONNX checker and strict shape inference on a file. Raises onnx's errors."""
    onnx.checker.check_model(str(path), full_check=True)


def write_graph(model: ir.Model, program: Program, weights: Path, *, check: bool = True) -> ExportedProgram:
    """Write a program's graph beside the weight file that it refers to, and check it."""
    path = weights.with_name(f"{program.name}.onnx")
    path.write_bytes(ir.to_proto(model).SerializeToString())
    if check:
        check_graph(path)
    return ExportedProgram(program, path.name, weights.name)


def export_part(
    part_name: str,
    part: nn.Module,
    geometry: Geometry,
    directory: Path,
    *,
    names: Iterable[str] | None = None,
    cpu: bool = False,
    check: bool = True,
    on_program: Callable[[str], None] | None = None,
) -> Iterator[ExportedProgram]:
    """Write the weight file and the graphs of one model part into `directory`, one program at a time.

    `part` already has the geometry's dtype; a transformer is linearized in place. With `cpu`, bfloat16 graphs are rewritten for ONNX
    Runtime's CPU provider. `names` restricts which programs are written.
    """
    if isinstance(part, SanaWM):
        linearize(part)
    part.eval().requires_grad_(False)
    weights = directory / f"{part_name}.safetensors"
    write_weights(weights, module_tensors(part))
    for name, program in programs(geometry, (part_name,)).items():
        if names is not None and name not in names:
            continue
        if on_program:
            on_program(name)
        model = trace(program, program_module(program, part))
        link_weights(model, weights, _PREFIXES)
        if cpu and geometry.dtype == "bfloat16":
            model = widen_bfloat16(model)
        yield write_graph(model, program, weights, check=check)

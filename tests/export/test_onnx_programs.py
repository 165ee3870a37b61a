"""Every exported program in ONNX Runtime against its torch module, on inputs that torch computed from a picture, a prompt and a camera path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sanawm.camera import CameraPacker, rope_time, to_model_range
from sanawm.model.checkpoint import Checkpoint, open_checkpoint
from sanawm.programs import ATTENTION_FIELDS, Geometry, Program, camera_program, programs
from sanawm.schedule import Chunk, chunk_grid, timestep_row
from sanawm_export.build import open_prompt
from sanawm_export.onnx.export import program_module
from sanawm_export.parts import load_part
from sanawm_runtime import World

# float32 in both, with other kernels: sums of a few hundred terms through four blocks.
TOLERANCE = 2e-5
PROGRAMS = """
text_encoder image_encoder decode_first decode prompt_kv camera_first denoise_first commit_first denoise_second commit_second camera denoise_steady
commit_steady
"""

Tensors = dict[str, Tensor]


class Reference:
    """The torch modules of a checkpoint, run in the order of a stream; keeps each program's inputs and outputs."""

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry) -> None:
        self.geometry = geometry
        parts = {name: load_part(checkpoint, name, torch.float32) for name in ("text", "vae", "dit")}
        of = {p: parts[name] for name in parts for p in programs(geometry, (name,))}
        self.modules = {name: program_module(program, of[name]) for name, program in programs(geometry).items()}
        self.inputs: dict[str, Tensors] = {}
        self.outputs: dict[str, Tensors] = {}

    def run(self, name: str, feeds: Tensors) -> Tensors:
        program: Program = self.modules[name].program
        self.inputs[name] = {spec.name: feeds[spec.name] for spec in program.inputs}
        with torch.no_grad():
            values = self.modules[name](*self.inputs[name].values())
        self.outputs[name] = {spec.name: x for spec, x in zip(program.outputs, values, strict=True)}
        return self.outputs[name]

    def chunk(self, chunk: Chunk, fixed: Tensors, past: Tensors, camera: Any, rng: np.random.Generator, first: Tensor) -> Tensors:
        """A denoising step and a clean pass; returns the clean pass's outputs."""
        world, name = self.geometry.config, camera_program(chunk.kind)
        cos, sin = rope_time(np.arange(chunk.start, chunk.end), world.dit)
        feeds = {"camera_conditions": camera.camera_conditions, "chunk_plucker": camera.chunk_plucker, "time_cos": cos, "time_sin": sin}
        fixed = fixed | past | self.run(name, {n: torch.from_numpy(x) for n, x in feeds.items()})
        shape = (1, world.dit.in_channels, chunk.frames, world.dit.height, world.dit.width)
        x = torch.from_numpy(rng.standard_normal(shape, np.float32))
        if chunk.index == 0:
            x[:, :, :1] = first
        step = fixed | {"latents": x, "timestep": torch.from_numpy(timestep_row(889, chunk))}
        self.run(f"denoise_{chunk.kind}", step)
        return self.run(f"commit_{chunk.kind}", step)


def renamed(outputs: Tensors, prefix: str) -> Tensors:
    return {name.replace("next.", f"{prefix}.", 1): x for name, x in outputs.items() if name.startswith("next.")}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tiny_world: World, make_path: Callable[[int, int], np.ndarray]) -> Reference:
    rng = np.random.default_rng(0)
    checkpoint = open_checkpoint(tiny_checkpoint)
    world = checkpoint.world
    reference = Reference(checkpoint, tiny_world.geometry)
    tokens = open_prompt(checkpoint).encode("a harbour at dawn, slow camera")
    text = reference.run("text_encoder", dict(zip(("input_ids", "attention_mask"), map(torch.from_numpy, tokens), strict=True)))
    picture = rng.integers(0, 256, (world.image_height, world.image_width, 3), dtype=np.uint8)
    first = reference.run("image_encoder", {"image": torch.from_numpy(to_model_range(picture))})["latents"]
    decoded = reference.run("decode_first", {"latents": first})
    reference.run("decode", {"latents": torch.from_numpy(rng.standard_normal(first.shape, np.float32))} | renamed(decoded, "past"))
    fixed = reference.run("prompt_kv", text) | {"text_mask": text["text_mask"]}

    packer, path = CameraPacker(world), make_path(73, 1)
    intrinsics = np.array([200.0, 200.0, world.image_width / 2, world.image_height / 2])
    sink: Tensors = {}
    past: Tensors = {}
    for chunk in chunk_grid(10):
        poses = path[packer.frames : packer.frames + packer.poses_needed(chunk.frames, chunk.index == 0)]
        after = reference.chunk(chunk, fixed, past, packer.push(poses, intrinsics), rng, first)
        if chunk.index == 0:
            sink = {n: x for n, x in renamed(after, "sink").items() if n.rsplit(".", 1)[1] in ATTENTION_FIELDS}
        past = renamed(after, "past") | (sink if chunk.index else {})
    return reference


@pytest.mark.parametrize("name", PROGRAMS.split())
def test_program(name: str, reference: Reference, tiny_world: World) -> None:
    engine, program = tiny_world.engine, tiny_world.programs[name]
    buffers = {spec.name: engine.allocate(spec) for spec in (*program.inputs, *program.outputs)}
    for spec in program.inputs:
        engine.write(buffers[spec.name], reference.inputs[name][spec.name].numpy())
    for spec in program.outputs:
        poison = np.full(spec.shape, np.nan if spec.dtype == "float32" else 7, None if spec.dtype == "float32" else spec.dtype)
        engine.write(buffers[spec.name], poison)
    engine.run(name, buffers)
    for spec in program.outputs:
        found, expected = engine.read(buffers[spec.name]), reference.outputs[name][spec.name].numpy()
        if spec.dtype == "float32":
            assert np.abs(expected).max() > 0
            assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), spec.name
        elif spec.dtype == "uint8":
            # A level may fall on the other side of a half.
            difference = np.abs(found.astype(int) - expected)
            assert difference.max() <= 1 and difference.mean() < 1e-3 and expected.std() > 1
        else:
            np.testing.assert_array_equal(found, expected)


def test_the_inputs_are_realistic(reference: Reference) -> None:
    """The comparison would show nothing on text that is all padding, states that are zero, or a camera that does not move."""
    steady = reference.inputs["denoise_steady"]
    assert 1 < steady["text_mask"].sum() < steady["text_mask"].numel()
    assert all(x.float().abs().max() > 0 for n, x in steady.items())
    rays = steady["rays"].reshape(3, -1, 4, 4)
    assert (rays[1:] - rays[:-1]).abs().amax((1, 2, 3)).min() > 1e-2
    assert {n.partition(".")[0] for n in steady} >= {"sink", "past", "keys", "values", "plucker"}
    assert not torch.equal(steady["sink.3.k"][:, :10], steady["past.3.k"][:, :10])

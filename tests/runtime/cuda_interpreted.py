"""The CUDA engine on two chunks of a small world, every launch run by Triton's interpreter from the raw parameters that the engine packed.

Prints, as JSON, the largest relative error of each result against the torch model. Runs in a process of its own: TRITON_INTERPRET must be set
before Triton is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import cuda_fake
import cuda_worlds
import numpy as np
import torch

from sanawm.camera.rope import rope_time
from sanawm.keys import dit_tensors
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.programs import camera_program, programs
from sanawm.schedule import step_sizes
from sanawm_export.onnx.modules import CameraProgram, DiTProgram, PromptKVProgram
from sanawm_kernels.aot.compile import load
from sanawm_runtime.engines._cuda_plan import DTYPES
from sanawm_runtime.engines.cuda import CudaEngine
from sanawm_runtime.state import StreamState


def interpreter(built: cuda_worlds.Built, driver: list[cuda_fake.FakeDriver]) -> Any:
    """Runs a launch as the driver saw it."""

    def tensor(address: int, kind: str) -> torch.Tensor:
        raw = (ctypes.c_uint8 * driver[0].room(address)).from_address(address)
        dtype = getattr(torch, DTYPES[kind])
        return torch.frombuffer(raw, dtype=torch.uint8)[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)

    def execute(launched: cuda_fake.Launched) -> None:
        variant = built.variants[launched.kernel]
        kinds = {name: kind.partition(":")[0] for name, kind in variant.signature.items()}
        values = {name: tensor(value, kinds[name][1:]) if kinds[name][0] == "*" else value for name, value in launched.values.items()}
        load(variant.kernel)[launched.grid](**values, **variant.constexprs, num_warps=variant.num_warps)

    return execute


@torch.no_grad()
def as_one_graph(
    engine: CudaEngine, built: cuda_worlds.Built, model: SanaWM, buffers: dict[str, Any], states: StreamState, values: dict[str, torch.Tensor],
    errors: dict[str, float],
) -> None:  # fmt: skip
    """Two steps of the second chunk and the clean pass on what they leave, in one graph."""
    signatures = programs(built.geometry, ("dit",))
    denoise, commit = signatures["denoise_second"], signatures["commit_second"]
    whole = {**buffers, **{name: engine.allocate(b.spec) for name, b in states.writes("second").items()}}
    x = values["latents"]
    engine.write(whole["latents"], x.numpy())
    rows = np.array([[889, 889], [727, 727]], np.float32)
    sizes = step_sizes(built.geometry.config.stream)[2:]
    engine.run_chunk("second", whole, rows, sizes, keep_first=False)
    for timestep, size in zip(rows, sizes):
        given = {**values, "latents": x, "timestep": torch.from_numpy(timestep[None])}
        x = x - size * DiTProgram(denoise, model).compute({s.name: given[s.name] for s in denoise.inputs})["velocity"]
    given = {**values, "latents": x}
    left = DiTProgram(commit, model).compute({s.name: given[s.name] for s in commit.inputs})
    for name in ("latents", "next.0.s_cam", "next.1.k"):
        got = torch.from_numpy(engine.read(whole[name])).double()
        want = (x if name == "latents" else left[name]).double()
        errors[f"graph {name}"] = float((got - want).norm() / want.norm())


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    world = cuda_worlds.small_world()
    built = cuda_worlds.Built(folder / "bundle", world)
    drivers: list[cuda_fake.FakeDriver] = []
    drivers.append(built.driver(interpreter(built, drivers)))
    engine = CudaEngine(built.bundle, built.device(drivers[0]))
    signatures = programs(built.geometry, ("dit",))
    with torch.device("meta"):
        model = SanaWM(world.dit)
    tensors = {name: torch.from_numpy(synth_tensor(name, info.shape, cuda_worlds.SEED)) for name, info in dit_tensors(world.dit).items()}
    model.load_state_dict(tensors, assign=True)
    random = np.random.default_rng(0)
    errors: dict[str, float] = {}
    buffers: dict[str, Any] = {}
    state: dict[str, torch.Tensor] = {}

    def put(spec: Any, values: np.ndarray) -> torch.Tensor:
        buffers[spec.name] = engine.allocate(spec)
        engine.write(buffers[spec.name], values)
        return torch.from_numpy(values)

    def compare(label: str, name: str, want: torch.Tensor) -> None:
        got = torch.from_numpy(engine.read(buffers[name])).double()
        errors[f"{label} {name}"] = float((got - want.double()).norm() / want.double().norm())

    @torch.no_grad()
    def run(name: str, inputs: dict[str, torch.Tensor], extra: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        program = signatures[name]
        kind = PromptKVProgram if name == "prompt_kv" else CameraProgram if name.startswith("camera") else DiTProgram
        want = kind(program, model).compute({spec.name: inputs[spec.name] for spec in program.inputs})
        for spec in program.outputs:
            if spec.name not in buffers and not (extra and spec.name in extra):
                buffers[spec.name] = engine.allocate(spec)
        engine.run(name, {**buffers, **(extra or {})})
        return want

    text = signatures["prompt_kv"].input("text")
    values: dict[str, torch.Tensor] = {"text": put(text, random.standard_normal(text.shape, np.float32))}
    values |= run("prompt_kv", values)
    compare("prompt_kv", "values.1", values["values.1"])
    mask = np.arange(world.dit.text_tokens)[None] < 7
    values["text_mask"] = put(signatures["denoise_first"].input("text_mask"), mask)
    states, start = StreamState(engine, built.geometry), 0
    for kind in ("first", "second"):
        camera, denoise, commit = (signatures[n] for n in (camera_program(kind), f"denoise_{kind}", f"commit_{kind}"))
        frames = built.geometry.frames(kind)
        for name in [n for n in buffers if not n.startswith(("keys.", "values.", "text"))]:
            del buffers[name]
        conditions = np.zeros((1, frames, 20), np.float32)
        for t in range(frames):
            conditions[0, t, :16] = np.eye(4).reshape(-1)
            conditions[0, t, [3, 7, 11]] = 0.2 * (start + t), 0.1, 0.3 * (start + t)
            conditions[0, t, 16:] = 3.0, 3.0, 1.5, 1.0
        cos, sin = rope_time(np.arange(start, start + frames), world.dit)
        maps = random.standard_normal(camera.input("chunk_plucker").shape, np.float32)
        for name, array in (("camera_conditions", conditions), ("chunk_plucker", maps), ("time_cos", cos), ("time_sin", sin)):
            values[name] = put(camera.input(name), array)
        values |= run(camera.name, values)
        compare(kind, "rays_inverse", values["rays_inverse"])
        latents = random.standard_normal(denoise.input("latents").shape, np.float32)
        values["latents"] = put(denoise.input("latents"), latents)
        row = np.full((1, frames), 889, np.float32)
        if kind == "first":
            row[0, 0] = 0
        values["timestep"] = put(denoise.input("timestep"), row)
        reads = states.reads(kind)
        values |= {name: state[name] for name in reads}
        velocity = run(denoise.name, values, reads)["velocity"]
        compare(kind, "velocity", velocity)
        size = step_sizes(world.stream)[2]
        engine.euler(buffers["latents"], buffers["velocity"], size, keep_first=kind == "first")
        stepped = torch.from_numpy(latents) - size * velocity
        if kind == "first":
            stepped[:, :, 0] = values["latents"][:, :, 0]
        compare(kind, "latents", stepped)
        if kind == "second":
            as_one_graph(engine, built, model, {**buffers, **reads}, states, values, errors)
        engine.write(buffers["latents"], latents)
        values["latents"] = torch.from_numpy(latents)
        new = run(commit.name, values, {**reads, **states.writes(kind)})
        buffers |= states.writes(kind)
        for name, tensor in cuda_worlds.held(model, new).items():
            compare(kind, name, tensor)
        state = {name.replace("next.", "past."): tensor for name, tensor in new.items()}
        states.advance(kind)
        start += frames
    buffers.clear()
    del states, reads, new
    engine.close()
    print(json.dumps({"errors": errors, "launches": len(drivers[0].launches)}))


if __name__ == "__main__":
    main()

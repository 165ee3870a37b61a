"""The start of a stream on the CUDA engine, from picture and prompt, every launch run by Triton's interpreter.

Prints, as JSON, the largest relative error of each program's outputs against the torch models. Runs in a process of its own: TRITON_INTERPRET must
be set before Triton is imported.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import cuda_fake
import cuda_worlds
import numpy as np
import torch

import sanawm_runtime.world
from sanawm.config import WorldConfig
from sanawm.keys import dit_tensors, text_tensors, vae_tensors
from sanawm.model.checkpoint.tiny_tokenizer import build_tokenizer
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE
from sanawm.programs import Geometry, programs
from sanawm.prompt import PromptTokenizer
from sanawm_export.build import PROMPT_FILE, TOKENIZER_FILE, program_entry
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.cuda.build import euler_programs
from sanawm_export.cuda.formats import Formats
from sanawm_export.cuda.lower import lower_parts
from sanawm_export.onnx.modules import ImageEncoderProgram, PromptKVProgram, TextEncoderProgram
from sanawm_kernels.aot.compile import load
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, TargetEntry
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import DTYPES, Launch
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.engines.cuda import CudaEngine
from sanawm_runtime.world import World

SEED, CHI, PROMPT = 5, "Describe the place.\nText: ", "a red bridge"


class Clip:
    """A bundle of every program of a small world in float32, with weights from a seed, and a driver that interprets its kernels."""

    def __init__(self, path: Path, world: WorldConfig) -> None:
        self.tokenizer = build_tokenizer(world.text.vocab)
        prompt = PromptTokenizer(self.tokenizer, CHI, world.dit.text_tokens)
        self.geometry = Geometry(world, prompt.max_length, 3, "float32")
        self.parts = lower_parts(self.geometry, Formats(), 0)
        self.lowered = {name: low for part in self.parts.values() for name, low in part.programs.items()}
        self.variants = {name: v for low in self.lowered.values() for name, v in low.variants.items()}
        self.entries = {name: cuda_fake.index_entry(variant, "sm_90") for name, variant in self.variants.items()}
        self.bundle = self._write(path, world)
        writes = {s.kernel: s.writes for low in self.lowered.values() for s in low.plan.steps if isinstance(s, Launch)}
        self.driver = cuda_fake.FakeDriver({name.encode(): entry for name, entry in self.entries.items()}, writes, self._execute)

    def _write(self, path: Path, world: WorldConfig) -> Bundle:
        signatures, rows = programs(self.geometry) | euler_programs(self.geometry), {}
        with BundleWriter(path) as writer:
            for key, part in self.parts.items():
                for name, low in part.programs.items():
                    writer.add_bytes(f"plans/{name}.json", low.plan.to_json())
                    extras: dict[str, object] = {"weights": f"weights/{key}.json", "kernels": "kernels/index.json", "arena": low.plan.arena}
                    extras |= {"tokenizer": TOKENIZER_FILE, "prompt": PROMPT_FILE} if name == "text_encoder" else {}
                    rows[name] = program_entry(signatures[name], f"plans/{name}.json", extras)
                tensors = [dataclasses.asdict(packed) for packed in part.tensors.values()]
                writer.add_bytes(f"weights/{key}.json", json.dumps({"tensors": tensors, "seed": SEED}).encode())
            for name in self.entries:
                writer.add_bytes(f"kernels/{name}.cubin", name.encode())
            writer.add_bytes("kernels/index.json", json.dumps({"kernels": list(self.entries.values())}).encode())
            writer.add_bytes(TOKENIZER_FILE, self.tokenizer.to_str().encode())
            writer.add_bytes(PROMPT_FILE, json.dumps({"chi": CHI}).encode())
            target, checkpoint = TargetEntry("h200", "cuda", "sm_90"), CheckpointEntry("test", "synthetic")
            return writer.finish(Manifest(world.name, utc_now(), world, target, PrecisionEntry("fp32"), rows, {}, {}, checkpoint))

    def _tensor(self, address: int, kind: str) -> torch.Tensor:
        raw = (ctypes.c_uint8 * self.driver.room(address)).from_address(address)
        dtype = getattr(torch, DTYPES[kind])
        return torch.frombuffer(raw, dtype=torch.uint8)[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)

    def _execute(self, launched: cuda_fake.Launched) -> None:
        variant = self.variants[launched.kernel]
        kinds = {name: kind.partition(":")[0] for name, kind in variant.signature.items()}
        values = {n: self._tensor(value, kinds[n][1:]) if kinds[n][0] == "*" else value for n, value in launched.values.items()}
        load(variant.kernel)[launched.grid](**values, **variant.constexprs, num_warps=variant.num_warps)


class Recorder(CudaEngine):
    """Remembers what programs took and gave."""

    ran: dict[str, dict[str, np.ndarray]]

    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        super().run(program, buffers)
        self.ran[program] = {name: np.array(self.read(buffer)) for name, buffer in buffers.items()}


def models(world: WorldConfig, geometry: Geometry) -> dict[str, Any]:
    """The torch models of the programs that a start runs."""

    def state(table: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(synth_tensor(name, info.shape, SEED)) for name, info in table.items()}

    encoder = TextEncoder.from_config(world.text, world.dit.text_tokens)
    encoder.model.load_state_dict(state(text_tensors(world.text)))
    vae, dit = VideoVAE(world.vae), SanaWM(world.dit)
    vae.load_state_dict(state(vae_tensors(world.vae)))
    dit.load_state_dict(state(dit_tensors(world.dit)))
    found = programs(geometry)
    return {
        "text_encoder": TextEncoderProgram(found["text_encoder"], encoder),
        "image_encoder": ImageEncoderProgram(found["image_encoder"], vae),
        "prompt_kv": PromptKVProgram(found["prompt_kv"], dit),
    }


@torch.no_grad()
def main() -> None:
    world_config = cuda_worlds.small_world()
    clip = Clip(Path(tempfile.mkdtemp()) / "bundle", world_config)
    engine = Recorder(clip.bundle, Gpu(driver=clip.driver))
    engine.ran = {}
    sanawm_runtime.world.open_engine = lambda bundle, threads: engine  # type: ignore[attr-defined]
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    with World(clip.bundle, free_encoders=True) as world:
        stream = world.start(picture, PROMPT)
        stream.close()
        del stream
    errors = {}
    for name, model in models(world_config, clip.geometry).items():
        given = {key: torch.from_numpy(value) for key, value in engine.ran[name].items()}
        want = model.compute({spec.name: given[spec.name] for spec in model.program.inputs})
        for key, tensor in want.items():
            if tensor.dtype == torch.bool:
                assert torch.equal(given[key], tensor), key
                continue
            errors[f"{name} {key}"] = float((given[key].double() - tensor.double()).norm() / tensor.double().norm())
    print(json.dumps({"errors": errors, "launches": len(clip.driver.launches)}))


if __name__ == "__main__":
    main()

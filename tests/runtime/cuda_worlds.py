"""Bundles for the CUDA engine's tests: real plans and weights, kernels by name only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cuda_fake  # beside this file
import torch
import torch.nn.functional as F

from sanawm.config import DiTConfig, StreamConfig, WorldConfig, tiny_config
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.programs import Geometry, programs
from sanawm_export.build import program_entry
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.cuda.build import euler_programs, merged_variants, write_packed
from sanawm_export.cuda.lower import dit_weights, lower_euler, lower_part_dit
from sanawm_export.cuda.tape import Lowered
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, TargetEntry
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import Launch

SEED = 5


def small_world() -> WorldConfig:
    """Two blocks, one of each kind, on a 2x2 grid: small enough for Triton's interpreter."""
    dit = DiTConfig(
        in_channels=8, hidden=32, depth=2, softmax_every=2, head_dim=16, cross_heads=2, caption_channels=16, text_tokens=12, height=2, width=2
    )
    tiny = tiny_config()
    return dataclasses.replace(
        tiny, dit=dit, text=dataclasses.replace(tiny.text, hidden=16), stream=StreamConfig(chunk_frames=2),
        vae=dataclasses.replace(tiny.vae, latent_channels=8, encoder_widths=(8, 16, 32, 32), decoder_widths=(8, 16, 32)),
    )  # fmt: skip


class Built:
    """A bundle on disk and what it was made from."""

    def __init__(self, path: Path, world: WorldConfig, *, seed: int | None = None, target: int = 0) -> None:
        self.geometry = Geometry(world, world.dit.text_tokens, 3, "float32")
        self.weights = dit_weights(self.geometry)
        self.lowered: dict[str, Lowered] = lower_part_dit(self.geometry, self.weights, target) | lower_euler(self.geometry)
        self.variants: dict[str, KernelVariant] = merged_variants(self.lowered)
        self.entries = {name: cuda_fake.index_entry(variant, "sm_90") for name, variant in self.variants.items()}
        self.bundle = self._write(path, world, seed)

    def _write(self, path: Path, world: WorldConfig, seed: int | None) -> Bundle:
        signatures = programs(self.geometry, ("dit",)) | euler_programs(self.geometry)
        rows = {}
        with BundleWriter(path) as writer:
            for name, result in self.lowered.items():
                writer.add_bytes(f"plans/{name}.json", result.plan.to_json())
                extras: dict[str, object] = {"weights": "weights/dit.json", "kernels": "kernels/index.json", "arena": result.plan.arena}
                rows[name] = program_entry(signatures[name], f"plans/{name}.json", extras)
            for name in self.entries:
                writer.add_bytes(f"kernels/{name}.cubin", self.image(name))
            writer.add_bytes("kernels/index.json", json.dumps({"kernels": list(self.entries.values())}).encode())
            tensors = tuple(self.weights.tensors.values())
            place: dict[str, Any] = {"seed": seed}
            if seed is None:
                write_packed(writer, "weights/dit.safetensors", tensors, lambda name, shape: synth_tensor(name, shape, SEED))
                place = {"file": "weights/dit.safetensors"}
            writer.add_bytes("weights/dit.json", json.dumps({"tensors": [dataclasses.asdict(t) for t in tensors], **place}).encode())
            target, checkpoint = TargetEntry("h200", "cuda", "sm_90"), CheckpointEntry("test", "synthetic")
            return writer.finish(Manifest(world.name, utc_now(), world, target, PrecisionEntry("fp32"), rows, {}, {}, checkpoint))

    @staticmethod
    def image(name: str) -> bytes:
        return f"cubin of {name}".encode()

    def writes(self) -> Mapping[str, tuple[str, ...]]:
        """Arguments that each kernel writes."""
        return {s.kernel: s.writes for low in self.lowered.values() for s in low.plan.steps if isinstance(s, Launch)}

    def driver(self, execute: Any = None, capability: int = 90) -> cuda_fake.FakeDriver:
        return cuda_fake.FakeDriver({self.image(name): entry for name, entry in self.entries.items()}, self.writes(), execute, capability)

    def device(self, driver: cuda_fake.FakeDriver) -> Gpu:
        return Gpu(driver=driver)


@torch.no_grad()
def held(model: SanaWM, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors as plans hold them: for the FFN's last frame stands what the next chunk's first frame adds for it."""
    found = dict(tensors)
    for name, tail in tensors.items():
        if name.endswith(".ffn_tail"):
            taps = model.get_parameter(f"blocks.{name.split('.')[1]}.mlp.t_conv.weight")
            found[name] = F.linear(tail.reshape(-1, taps.shape[1]), taps[:, :, 0, 0]).reshape(tail.shape)
    return found

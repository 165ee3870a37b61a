"""Each program as a torch module from its flat inputs to its flat outputs, in the signature's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sanawm.model.dit import BlockState, CameraFeatures, ChunkState, SanaWM, TextFeatures
from sanawm.model.vae import StreamingDecoder, VideoVAE
from sanawm.programs import Program


class Named(nn.Module):
    """Maps positional tensors to names, so that the signature alone decides the order."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = self.compute({spec.name: x for spec, x in zip(self.program.inputs, tensors, strict=True)})
        return tuple(named[spec.name] for spec in self.program.outputs)


class TextEncoderProgram(Named):
    """token ids, mask -> text embedding, text mask."""

    def __init__(self, program: Program, encoder: nn.Module) -> None:
        super().__init__(program)
        self.encoder = encoder

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        text, mask = self.encoder(t["input_ids"], t["attention_mask"])
        return {"text": text, "text_mask": mask.bool()}


class ImageEncoderProgram(Named):
    """First frame -> normalised latent."""

    def __init__(self, program: Program, vae: VideoVAE) -> None:
        super().__init__(program)
        self.vae = vae

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": self.vae.encode_mode(t["image"].to(self.vae.latents_std.dtype))}


class DecodeProgram(Named):
    """Latent frame and decoder state -> frames and new state; without state inputs it is the stream's first frame."""

    def __init__(self, program: Program, vae: VideoVAE) -> None:
        super().__init__(program)
        self.decoder = StreamingDecoder(vae)

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        state = tuple(x for name, x in t.items() if name.startswith("past."))
        if state:
            pixels, state = self.decoder.decode_next(t["latents"], state)
        else:
            pixels, state = self.decoder.decode_first(t["latents"])
        # Round half to even, as the library the official pipeline saves video with.
        levels = torch.clamp((pixels.float() + 1) * 127.5, 0, 255).round().to(torch.uint8)
        frames = levels.squeeze(0).permute(1, 2, 3, 0)
        names = [spec.name for spec in self.program.outputs[1:]]
        return {"frames": frames, **dict(zip(names, state, strict=True))}


class PromptKVProgram(Named):
    """Text embedding -> cross-attention keys and values of all blocks."""

    def __init__(self, program: Program, model: SanaWM) -> None:
        super().__init__(program)
        self.model = model

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        text = self.model.encode_text(t["text"], torch.ones(t["text"].shape[:2], dtype=torch.bool))
        return {f"{part}.{i}": x for part in ("keys", "values") for i, x in enumerate(getattr(text, part))}


class CameraProgram(Named):
    """A chunk's poses and Plücker maps -> step-independent camera features."""

    def __init__(self, program: Program, model: SanaWM) -> None:
        super().__init__(program)
        self.model = model

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        camera = self.model.encode_camera(t["camera_conditions"], t["chunk_plucker"], t["time_cos"], t["time_sin"])
        named = {name: getattr(camera, name) for name in ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")}
        return named | {f"plucker.{i}": x for i, x in enumerate(camera.plucker)}


def _past(t: dict[str, Tensor], depth: int, prefix: str) -> ChunkState | None:
    """The chunk state under `prefix`, or None where the signature has none. A sink carries attention entries alone."""
    fields: list[dict[str, Any]] = [{} for _ in range(depth)]
    for name, x in t.items():
        head, _, rest = name.partition(".")
        if head == prefix:
            block, _, field = rest.partition(".")
            fields[int(block)][field] = x
    if not any(fields):
        return None
    return tuple(BlockState(**{"ffn_tail": torch.empty(0), **f}) for f in fields)


class DiTProgram(Named):
    """One evaluation of the transformer on a chunk: `denoise_*` gives the velocity, `commit_*` the new state."""

    def __init__(self, program: Program, model: SanaWM) -> None:
        super().__init__(program)
        self.model = model
        self.commit = program.outputs[0].name != "velocity"

    def compute(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        depth = self.model.config.depth

        def blocks(part: str) -> tuple[Tensor, ...]:
            return tuple(t[f"{part}.{i}"] for i in range(depth))

        text = TextFeatures(blocks("keys"), blocks("values"), t["text_mask"])
        fixed = {name: t[name] for name in ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")}
        camera = CameraFeatures(**fixed, plucker=blocks("plucker"))
        past = [state for state in (_past(t, depth, "sink"), _past(t, depth, "past")) if state is not None]
        latents = t["latents"]
        timestep = torch.zeros(1, latents.shape[2]) if self.commit else t["timestep"]
        velocity, state = self.model(latents, timestep, text, camera, past=past, commit=self.commit)
        if velocity is not None:
            return {"velocity": velocity}
        return {f"next.{i}.{name}": x for i, block in enumerate(state) for name, x in block.tensors().items()}

"""Programs to launch plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sanawm.programs import Geometry, programs
from sanawm_export.cuda.conditions import lower_camera, lower_prompt_kv
from sanawm_export.cuda.decoder import lower_decode
from sanawm_export.cuda.dit import lower_dit
from sanawm_export.cuda.formats import Formats
from sanawm_export.cuda.image_encoder import lower_image
from sanawm_export.cuda.image_weights import ImageWeights
from sanawm_export.cuda.tape import Lowered
from sanawm_export.cuda.text_encoder import lower_text
from sanawm_export.cuda.text_weights import TextWeights
from sanawm_export.cuda.vae_weights import DecoderWeights
from sanawm_export.cuda.weights import DiTWeights
from sanawm_kernels.chunk import plans as chunk
from sanawm_runtime.engines._cuda_pack import Packed
from sanawm_runtime.engines._cuda_plan import TRITON_TYPES, Argument, Buffer, Launch, Plan, View, dense

# What shares weights: the transformer, the decoder, and the encoders of pictures and of prompts.
PARTS = ("dit", "vae", "image", "text")


def dit_weights(geometry: Geometry, formats: Formats | None = None) -> DiTWeights:
    """Packed weights of the transformer for a geometry."""
    return DiTWeights(geometry.config.dit, geometry.dtype, geometry.config.stream.timesteps, formats or Formats())


def lower_part_dit(geometry: Geometry, weights: DiTWeights, target: int) -> dict[str, Lowered]:
    """Every program of the transformer, by name, for compute capability `target` (90 for sm_90)."""
    lowered = {}
    for name, program in programs(geometry, ("dit",)).items():
        lower = lower_prompt_kv if name == "prompt_kv" else lower_camera if name.startswith("camera") else lower_dit
        lowered[name] = lower(program, weights, target)
    return lowered


def lower_part_decoder(geometry: Geometry, weights: DecoderWeights, target: int) -> dict[str, Lowered]:
    """`decode_first` and `decode`."""
    found = programs(geometry, ("vae",))
    return {name: lower_decode(found[name], weights, target) for name in ("decode_first", "decode")}


@dataclass(frozen=True)
class Part:
    """Programs that share weights, and the packed weights; an engine gives these back when it needs none of the programs."""

    programs: Mapping[str, Lowered]
    tensors: Mapping[str, Packed]


def lower_parts(geometry: Geometry, formats: Formats, target: int) -> dict[str, Part]:
    """Every program of a world by part; without a causal decoder its two programs are left out."""
    config, dtype = geometry.config, geometry.dtype
    dit, vae = dit_weights(geometry, formats), DecoderWeights(config.vae, dtype)
    text, image = TextWeights(config.text, dtype), ImageWeights(config.vae, dtype)
    encoders = lower_encoders(geometry, text, image, target)
    return {
        "dit": Part(lower_part_dit(geometry, dit, target) | lower_euler(geometry), dit.tensors),
        "vae": Part(lower_part_decoder(geometry, vae, target) if config.vae.decoder_causal else {}, vae.tensors),
        "image": Part({"image_encoder": encoders["image_encoder"]}, image.tensors),
        "text": Part({"text_encoder": encoders["text_encoder"]}, text.tensors),
    }


def lower_encoders(geometry: Geometry, text: TextWeights, image: ImageWeights, target: int) -> dict[str, Lowered]:
    """`text_encoder` and `image_encoder`."""
    found = programs(geometry, ("text", "vae"))
    return {
        "text_encoder": lower_text(found["text_encoder"], text, target),
        "image_encoder": lower_image(found["image_encoder"], image, target),
    }


def lower_euler(geometry: Geometry) -> dict[str, Lowered]:
    """The Euler step on the latents of each chunk length, `euler.<frames>`; the numbers `size` and `KEPT` are given at run time."""
    config, lowered = geometry.config.dit, {}
    for frames in sorted({geometry.frames("first"), geometry.frames("steady")}):
        name, shape = f"euler.{frames}", (1, config.in_channels, frames, config.height, config.width)
        variant = chunk.euler_step(TRITON_TYPES[geometry.dtype], frames, config.tokens_per_frame)
        buffers = {n: Buffer(n, role, geometry.dtype, shape) for n, role in (("latents", "output"), ("velocity", "input"))}  # type: ignore[arg-type]
        views = {n: View(n, geometry.dtype, shape, dense(shape)) for n in buffers}
        arguments: dict[str, Argument] = {**views, "size": 0.0, "SIZE": math.prod(shape), "KEPT": 0}
        launch = Launch(0, "euler", variant.name, variant.launch_grid({"SIZE": math.prod(shape)}), arguments, ("latents",))
        lowered[name] = Lowered(Plan(name, buffers, (launch,), 0), {variant.name: variant})
    return lowered

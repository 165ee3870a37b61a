"""Encoders and decoder of the CUDA engine beside the torch models: the same picture, token ids and latents through both.

Used by engine_numerics.py. The decoder is compared on a clip's first latent frame and the one that follows it, each side with its own state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from engine_torch import Weights  # beside this file
from numpy.typing import NDArray

from sanawm.bfloat16 import round_to
from sanawm.config import WorldConfig
from sanawm.model.vae import StreamingDecoder
from sanawm.model.vae.pixels import to_uint8
from sanawm.programs import TensorSpec
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines.cuda import CudaBuffer, CudaEngine

# Of the prompt's tokens; the rest is padding.
WORDS = 0.7
Values = dict[str, NDArray[Any]]


def inputs(world: WorldConfig, prompt_tokens: int, seed: int) -> Values:
    """Random token ids with their mask, a picture and two latent frames; latents are rounded as the engine stores them."""
    random, dit = np.random.default_rng(seed), world.dit
    latents = random.standard_normal((1, dit.in_channels, 2, dit.height, dit.width), np.float32)
    return {
        "input_ids": random.integers(0, world.text.vocab, (1, prompt_tokens)),
        "attention_mask": (np.arange(prompt_tokens)[None] < WORDS * prompt_tokens).astype(np.int64),
        "image": random.uniform(-1, 1, (1, 3, 1, world.image_height, world.image_width)).astype(np.float32),
        "latents": round_to(latents, "bfloat16"),
    }


def prompt_tokens(bundle: Bundle) -> int:
    """Padded length of the prompts of a bundle."""
    return bundle.manifest.programs["text_encoder"].inputs[0].shape[1]


def on_engine(engine: CudaEngine, bundle: Bundle, given: Values) -> Values:
    """Outputs by program: embedding and `text_mask`, latent, frames of the first latent frame and of the second."""

    def buffers(program: str) -> dict[str, CudaBuffer]:
        entry = bundle.manifest.programs[program]
        return {t.name: engine.allocate(TensorSpec(t.name, t.dtype, t.shape)) for t in (*entry.inputs, *entry.outputs)}

    found = {}
    text, image, first, second = (buffers(name) for name in ("text_encoder", "image_encoder", "decode_first", "decode"))
    second |= {name.replace("next.", "past.", 1): buffer for name, buffer in first.items() if name.startswith("next.")}
    for name in ("input_ids", "attention_mask"):
        engine.write(text[name], given[name])
    engine.write(image["image"], given["image"])
    for t, frame in enumerate((first, second)):
        engine.write(frame["latents"], given["latents"][:, :, t : t + 1])
    for program, bound, output in (
        ("text_encoder", text, "text"), ("image_encoder", image, "latents"), ("decode_first", first, "frames"), ("decode", second, "frames"),
    ):  # fmt: skip
        engine.run(program, bound)
        found[program] = engine.read(bound[output])
    found["text_mask"] = engine.read(text["text_mask"])
    return found


@torch.no_grad()
def on_torch(weights: Weights, given: Values, device: str) -> tuple[Values, Values]:
    """The torch models' outputs in bfloat16 and in float32, as `on_engine` gives them."""
    half: Values = {}
    whole: Values = {}
    ids, mask = (torch.from_numpy(given[name]).to(device) for name in ("input_ids", "attention_mask"))
    encoder = weights.text(device)
    for found, dtype in ((whole, torch.float32), (half, torch.bfloat16)):
        for parameter in encoder.parameters():
            parameter.data = parameter.data.to(dtype)
        text, seen = encoder(ids, mask)
        found["text_encoder"], found["text_mask"] = text.float().cpu().numpy(), seen.cpu().numpy()
    del encoder
    vae = weights.vae()
    for found, dtype in ((whole, torch.float32), (half, torch.bfloat16)):
        vae = vae.to(device, dtype)
        decoder = StreamingDecoder(vae)
        found["image_encoder"] = vae.encode_mode(torch.from_numpy(given["image"]).to(device, dtype)).float().cpu().numpy()
        frames = decoder.segments(torch.from_numpy(given["latents"]).to(device, dtype))
        for name, pixels in zip(("decode_first", "decode"), frames):
            found[name] = to_uint8(pixels)[0].permute(1, 2, 3, 0).cpu().numpy()
    return half, whole


def distances(found: Values, want: Values) -> dict[str, float]:
    """Relative distance of each program's output: embeddings of real tokens, latents, and pixels from the middle grey.

    Raises SystemExit where the masks differ, which have no rounding.
    """
    if not np.array_equal(found["text_mask"], want["text_mask"]):
        raise SystemExit("the text masks differ")
    rows = want["text_mask"][0].astype(bool)

    def values(outputs: Values, name: str) -> NDArray[np.float64]:
        array = outputs[name].astype(np.float64)
        return array[0, rows] if name == "text_encoder" else array - 127.5 if name.startswith("decode") else array

    result = {}
    for name in ("text_encoder", "image_encoder", "decode_first", "decode"):
        a, b = values(found, name), values(want, name)
        result[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return result

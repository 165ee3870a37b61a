"""The transformer against diffusers' SanaWMTransformer3DModel, live and in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import SanaWMTransformer3DModel

from sanawm.config import DiTConfig
from sanawm.keys import dit_tensors, parameters, to_diffusers
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import camera_features

# diffusers clamps the RMS after UCPE and pads camera heads that are not 32, 64, 128 or 256 wide before it scales.
SMALL = DiTConfig(
    in_channels=8, hidden=64, depth=4, head_dim=32, cross_heads=2, caption_channels=24, text_tokens=8, height=3, width=4, rms_clamp=True
)
PADDED = 1 / math.sqrt(128)


@pytest.fixture(autouse=True)
def full_precision_attention() -> Iterator[None]:
    """diffusers rounds q, k, v of softmax attention to bfloat16 even in float32 models."""
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
        yield


def diffusers_model(config: DiTConfig, model: SanaWM) -> Any:
    """diffusers' model with the same weights, without a second copy of them."""
    with torch.device("meta"):
        theirs: Any = SanaWMTransformer3DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            hidden_size=config.hidden,
            num_attention_heads=config.cross_heads,
            softmax_every_n=config.softmax_every,
            linear_head_dim=config.head_dim,
            caption_channels=config.caption_channels,
            chunk_plucker_post_attn_blocks=config.depth,
        )
    # The rotary table is a plain attribute, which neither the state dict nor `to_empty` fills.
    theirs.rope = type(theirs.rope)(config.head_dim, (1, 1, 1), 1024)
    state = {to_diffusers(name): tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


def compare(config: DiTConfig, frames: int, make_model: Any, make_clip: Any, seed: int = 0) -> tuple[float, float]:
    """Largest difference of the two velocities, and the largest velocity."""
    model, clip = make_model(config, seed), make_clip(config, frames, seed)
    timestep = torch.full((1, frames), 727.9)
    timestep[0, 0] = 0
    camera = camera_features(model, clip.camera, clip.plucker, 0, frames)
    with torch.no_grad():
        ours, _ = model(clip.latents, timestep, clip.features(model), camera)
        theirs = diffusers_model(config, model)(
            clip.latents,
            timestep[:, None],
            clip.text,
            encoder_attention_mask=clip.mask,
            camera_conditions=clip.camera,
            chunk_plucker=clip.plucker,
            return_dict=False,
        )[0]
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


# float32 on sums of up to 2240 terms in another order; a bfloat16 rounding anywhere gives 4e-5 and more.
TOLERANCE = 5e-6


@pytest.mark.parametrize(
    ("change", "frames"),
    [
        ({}, 7),
        ({"depth": 5, "hidden": 96, "cross_heads": 3, "height": 2, "width": 5}, 5),
        ({"hidden": 112, "head_dim": 112, "cross_heads": 1, "depth": 2, "softmax_every": 2, "camera_softmax_scale": PADDED}, 5),
        ({"hidden": 128, "head_dim": 64, "cross_heads": 4, "depth": 2, "softmax_every": 2}, 6),
        ({"hidden": 48, "head_dim": 16, "cross_heads": 3, "depth": 3, "softmax_every": 3, "camera_softmax_scale": PADDED}, 9),
    ],
    ids=["d32", "five-blocks", "d112-padded-scale", "d64", "d16-padded-scale"],
)
def test_dense(change: dict[str, Any], frames: int, make_model: Any, make_clip: Any) -> None:
    error, scale = compare(replace(SMALL, **change), frames, make_model, make_clip)
    assert scale > 0.5 and error <= TOLERANCE


def test_the_padded_scale_is_what_diffusers_computes(make_model: Any, make_clip: Any) -> None:
    config = replace(SMALL, hidden=112, head_dim=112, cross_heads=1, depth=1, softmax_every=1)
    right, _ = compare(replace(config, camera_softmax_scale=PADDED), 5, make_model, make_clip)
    wrong, _ = compare(config, 5, make_model, make_clip)
    assert right <= TOLERANCE < wrong


@pytest.mark.parametrize("softmax_every", [4, 1], ids=["gdn", "softmax"])
def test_one_block_of_full_width(softmax_every: int, make_model: Any, make_clip: Any) -> None:
    config = DiTConfig(depth=1, softmax_every=softmax_every, height=4, width=6, text_tokens=32, rms_clamp=True, camera_softmax_scale=PADDED)
    error, scale = compare(config, 3, make_model, make_clip)
    assert scale > 0.5 and error <= TOLERANCE


def test_full_size_parameters() -> None:
    with torch.device("meta"):
        ours = SanaWM(DiTConfig())
        theirs: Any = SanaWMTransformer3DModel()
    assert sum(p.numel() for p in ours.parameters()) == 2_661_800_448
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert {to_diffusers(name): shape for name, shape in shapes.items()} == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    table = dit_tensors(DiTConfig())
    assert shapes == {name: info.shape for name, info in table.items()} and parameters(table) == 2_661_800_448
    assert {name for name, _ in ours.named_buffers()} == {name for name, info in table.items() if info.buffer}

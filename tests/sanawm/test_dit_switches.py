"""Every point on which implementations differ is a field of the configuration that does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sanawm.config import DiTConfig, StreamConfig
from sanawm.model.sampler import camera_features, stream

SMALL = DiTConfig(
    in_channels=4, hidden=32, depth=2, softmax_every=2, head_dim=16, cross_heads=2, caption_channels=8, text_tokens=5, height=2, width=3
)
FRAMES = 7


def velocity(config: DiTConfig, make_model: Any, make_clip: Any) -> Tensor:
    """Of the whole clip in two chunks of three and four frames, float64."""
    model, clip = make_model(config, 1, torch.float64), make_clip(config, FRAMES, 1, torch.float64)
    camera = camera_features(model, clip.camera, clip.plucker, 0, FRAMES)
    return model(clip.latents, torch.full((1, FRAMES), 500.0), clip.features(model), camera, chunks=(4, 3))[0]


@pytest.mark.parametrize("change", [{"rms_clamp": True}, {"main_softmax_scale": 0.2}, {"camera_softmax_scale": 0.2}], ids=lambda c: next(iter(c)))
def test_changes_the_velocity(change: dict[str, Any], make_model: Any, make_clip: Any) -> None:
    base, changed = (velocity(c, make_model, make_clip) for c in (SMALL, replace(SMALL, **change)))
    assert (base - changed).abs().max() > 1e-3


def test_the_camera_tail_matters_from_the_second_chunk_on(make_model: Any, make_clip: Any) -> None:
    base, changed = (velocity(c, make_model, make_clip) for c in (SMALL, replace(SMALL, camera_conv_tail=False)))
    assert torch.equal(base[:, :, :4], changed[:, :, :4]) and (base[:, :, 4:] - changed[:, :, 4:]).abs().max() > 1e-4


def test_explicit_default_scales_change_nothing(make_model: Any, make_clip: Any) -> None:
    explicit = replace(SMALL, main_softmax_scale=0.25, camera_softmax_scale=0.25)
    assert torch.equal(velocity(SMALL, make_model, make_clip), velocity(explicit, make_model, make_clip))


@pytest.mark.parametrize("branch", ["main", "camera"])
def test_each_scale_belongs_to_its_branch(branch: str, make_model: Any, make_clip: Any) -> None:
    """With the camera branch's projection at zero its scale has no effect, and the main branch's still has."""
    config = replace(SMALL, depth=1, softmax_every=1)
    model, clip = make_model(config, 1, torch.float64), make_clip(config, FRAMES, 1, torch.float64)
    projection = model.blocks[0].attn.out_proj_cam
    torch.nn.init.zeros_(projection.weight)
    camera = camera_features(model, clip.camera, clip.plucker, 0, FRAMES)
    found = []
    for scale in (0.25, 0.5):
        change: dict[str, Any] = {f"{branch}_softmax_scale": scale}
        model.blocks[0].attn.config = replace(config, **change)
        found.append(model(clip.latents, torch.full((1, FRAMES), 500.0), clip.features(model), camera)[0])
    assert torch.equal(*found) == (branch == "camera")


def test_ray_dtype(make_model: Any, make_clip: Any) -> None:
    clip = make_clip(SMALL, FRAMES, 2)
    camera = clip.camera.clone()
    # Far from the first frame, where bfloat16 loses a frame's step.
    camera[..., [3, 7, 11]] += 20
    features = {
        dtype: camera_features(make_model(replace(SMALL, ray_dtype=dtype), 1), camera, clip.plucker, 0, FRAMES) for dtype in ("float32", "bfloat16")
    }
    exact = camera_features(make_model(SMALL, 1, torch.float64), camera.double(), clip.plucker.double(), 0, FRAMES)
    errors = {dtype: (f.rays.double() - exact.rays).abs().max().item() for dtype, f in features.items()}
    # Translations of 35 units: a few float32 roundings of 4e-6, and of bfloat16's 0.13.
    assert errors["float32"] < 2e-5 and 0.05 < errors["bfloat16"] < 2
    assert all(f.rays.dtype == f.rays_inverse.dtype == torch.float32 for f in features.values())
    latents, text = clip.latents, clip
    model = make_model(SMALL, 1)
    out = [model(latents, torch.zeros(1, FRAMES), text.features(model), f)[0] for f in features.values()]
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_a_ray_that_is_not_a_number_gets_the_identity(make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL, 1), make_clip(SMALL, 3, 2)
    camera = clip.camera.clone()
    camera[0, 1, 16] = float("nan")
    rays = camera_features(model, camera, clip.plucker, 0, 3).rays.reshape(3, -1, 4, 4)
    assert torch.equal(rays[1], torch.eye(4).expand_as(rays[1])) and rays.isfinite().all()
    assert torch.equal(rays[[0, 2]], camera_features(model, clip.camera, clip.plucker, 0, 3).rays.reshape(3, -1, 4, 4)[[0, 2]])


def test_rays_are_those_of_the_camera_package(make_model: Any, make_clip: Any) -> None:
    from sanawm.camera import ray_matrices

    model, clip = make_model(SMALL, 1, torch.float64), make_clip(SMALL, 5, 3, torch.float64)
    camera = camera_features(model, clip.camera, clip.plucker, 0, 5)
    P, inverse = ray_matrices(clip.camera[0].numpy(), SMALL.height, SMALL.width)
    # The same formulas in float64.
    np.testing.assert_allclose(camera.rays[0].numpy(), P.reshape(-1, 4, 4), atol=1e-13, rtol=0)
    np.testing.assert_allclose(camera.rays_inverse[0].numpy(), inverse.reshape(-1, 4, 4), atol=1e-13, rtol=0)
    eye = np.broadcast_to(np.eye(4), camera.rays[0].shape)
    # The rays' own axes are orthonormal in float64, whatever the pose's.
    np.testing.assert_allclose((camera.rays @ camera.rays_inverse)[0].numpy(), eye, atol=1e-13, rtol=0)


def test_bfloat16_model_stays_near_float32(make_model: Any, make_clip: Any) -> None:
    clip = make_clip(SMALL, FRAMES, 4)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(SMALL, 1, dtype)
        steps = list(stream(model, clip.latents.to(dtype), clip.features(model), clip.camera, clip.plucker, StreamConfig()))
        assert all(s.latents.dtype == dtype for s in steps)
        state = steps[0].state[0]
        # The scan's state stays wide.
        assert state.s is not None and state.z is not None and state.s_cam is not None
        assert state.s.dtype == state.z.dtype == state.s_cam.dtype == torch.float32 and state.ffn_tail.dtype == dtype
        outputs.append(torch.cat([s.latents for s in steps], 2).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    # bfloat16 rounds by 2**-9 at each of a few dozen steps, which comes to 0.4 to 0.7 % with these weights.
    assert 1e-4 < error < 0.02

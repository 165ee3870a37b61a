"""The transformer with fused GDN blocks against the transformer with plain ones, two chunks of a stream."""

from __future__ import annotations

from dataclasses import replace

import torch

from sanawm.config import tiny_config
from sanawm.model.dit.model import SanaWM
from sanawm_kernels import ops
from sanawm_kernels.gdn import fused


def test_stream_of_two_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    config = replace(tiny_config().dit, height=1, width=3, depth=1)
    model = SanaWM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 10
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    T, grid = 2, (config.height, config.width)
    camera = torch.zeros(1, T, 20)
    camera[..., :16] = torch.eye(4).flatten()
    camera[..., 16:] = torch.tensor([3.0, 2.0, 1.5, 0.5])
    camera[0, :, 3] = torch.tensor([0.2, 0.6])
    angle = torch.rand(T, config.rope_pairs[0], generator=generator)
    plucker = torch.randn(1, config.plucker_channels, T, *grid, generator=generator)
    latents = torch.randn(2, 1, config.in_channels, T, *grid, generator=generator)
    text = model.encode_text(torch.randn(1, 4, config.caption_channels, generator=generator), torch.ones(1, 4))
    features = model.encode_camera(camera, plucker, angle.cos(), angle.sin())

    def stream() -> torch.Tensor:
        _, state = model(latents[0], torch.zeros(1, T), text, features, commit=True)
        velocity, _ = model(latents[1], torch.full((1, T), 727.0), text, features, past=(state,))
        assert velocity is not None
        return velocity

    plain = stream()
    with ops.implementation(fused.FUSED):
        found = stream()
    # Both are float32 and differ in the order of sums, here and in the layers after.
    assert float((found - plain).abs().max()) < 32 * torch.finfo(torch.float32).eps * float(plain.abs().max())

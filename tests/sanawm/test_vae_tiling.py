"""Tiled decoding of the video VAE against decoding at once and against diffusers' tiles."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import tiny_config
from sanawm.errors import InputError
from sanawm.model.vae import Tiling, VideoVAE, decode_tiled, tiled_segments
from sanawm.model.vae.tiling import tile_spans, tile_weights

CONFIG = tiny_config().vae
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(CONFIG).eval().requires_grad_(False)


def latents(frames: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(1, CONFIG.latent_channels, frames, h, w, generator=torch.Generator().manual_seed(1))


@given(st.integers(2, 60), st.integers(2, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_weights_sum_to_one(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers((size + 1) // 2, size - 1))
    scale = data.draw(st.sampled_from([1, 8, 32]))
    spans = tile_spans(length, size, stride)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(start == index * stride and 2 <= stop - start <= size for index, (start, stop) in enumerate(spans))
    total = torch.zeros(length * scale)
    for (start, stop), weight in zip(spans, tile_weights(spans, scale, CPU), strict=True):
        assert weight.min() >= 0
        total[start * scale : stop * scale] += weight
    # fp32: k/n and 1 - k/n.
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_official_grid() -> None:
    assert tile_spans(22, 16, 14) == [(0, 16), (14, 22)]
    assert tile_spans(40, 16, 14) == [(0, 16), (14, 30), (28, 40)]
    assert tile_spans(21, 13, 8) == [(0, 13), (8, 21)]
    assert tile_spans(121, 13, 8)[-1] == (112, 121)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_one_tile_is_plain_decode(vae: VideoVAE, causal: bool) -> None:
    z = latents(3, 4, 3)
    assert torch.equal(decode_tiled(vae, z, causal, Tiling(side=128, side_stride=64, frames=16, frames_stride=8)), vae.decode(z, causal))


@torch.no_grad()
def test_spatial_tiles_are_diffusers(vae: VideoVAE) -> None:
    oracle: Any = AutoencoderKLLTX2Video(
        latent_channels=CONFIG.latent_channels,
        block_out_channels=CONFIG.encoder_widths,
        layers_per_block=CONFIG.encoder_layers,
        decoder_block_out_channels=CONFIG.decoder_widths,
        decoder_layers_per_block=CONFIG.decoder_layers,
        decoder_causal=False,
        spatial_compression_ratio=CONFIG.spatial_stride,
        temporal_compression_ratio=CONFIG.temporal_stride,
    )
    oracle.eval().load_state_dict(vae.state_dict())
    oracle.enable_tiling(tile_sample_min_height=96, tile_sample_min_width=96, tile_sample_stride_height=64, tile_sample_stride_width=64)
    z = latents(2, 4, 6)
    got = decode_tiled(vae, z, causal=False, tiling=Tiling(side=96, side_stride=64))
    difference = (got - oracle.decode(z).sample).abs()
    # Where four tiles meet diffusers weighs its two ramps unevenly, so those corners are left out.
    for left in (64, 128):
        difference[:, :, :, 64:96, left : left + 32] = 0
    # fp32 rounding, as for untiled decoding.
    assert difference.max() <= 1e-5


@torch.no_grad()
def test_parts_come_in_order_and_add_up(vae: VideoVAE) -> None:
    tiling = Tiling(side=96, side_stride=64, frames=24, frames_stride=16)
    z = latents(7, 3, 4)
    parts = list(tiled_segments(vae, z, False, tiling))
    assert [part.shape[2] for part in parts] == [17, 16, 16]
    assert torch.equal(torch.cat(parts, dim=2), decode_tiled(vae, z, False, tiling))


@torch.no_grad()
@given(frames=st.integers(1, 9), h=st.integers(2, 5), w=st.integers(2, 5))
@settings(max_examples=8, deadline=None)
def test_any_size_has_every_pixel(vae: VideoVAE, frames: int, h: int, w: int) -> None:
    video = decode_tiled(vae, latents(frames, h, w), False, Tiling(side=64, side_stride=32, frames=16, frames_stride=8))
    assert video.shape == (1, 3, 8 * frames - 7, 32 * h, 32 * w)
    assert video.isfinite().all()


def local_vae(causal: bool) -> VideoVAE:
    """A VAE whose decoder's convolutions see one pixel of one frame, so that a tile's borders change nothing."""
    torch.manual_seed(3)
    vae = VideoVAE(CONFIG).eval().requires_grad_(False)
    for parameter in vae.decoder.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
            parameter[:, :, 2 if causal else 1, 1, 1] = torch.randn(parameter.shape[:2]) * parameter.shape[1] ** -0.5
    return vae


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_tiles_land_where_they_belong(causal: bool) -> None:
    vae, z = local_vae(causal), latents(9, 4, 5)
    tiled = decode_tiled(vae, z, causal, Tiling(side=96, side_stride=64, frames=24, frames_stride=16))
    # fp32 rounding, as for untiled decoding, at outputs of about 3.
    torch.testing.assert_close(tiled, vae.decode(z, causal), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_smooth_video_has_no_seams(vae: VideoVAE, causal: bool) -> None:
    # A latent that drifts slowly decodes nearly alike with and without tiles, though tiles cut off what lies beyond their borders.
    drift = torch.linspace(0, 1, 12).reshape(-1, 1, 1) + torch.linspace(0, 1, 7).reshape(-1, 1) + torch.linspace(0, 1, 4)
    direction = torch.randn(CONFIG.latent_channels, generator=torch.Generator().manual_seed(2)).reshape(1, -1, 1, 1, 1)
    z = direction * (1 + 0.05 * drift)
    whole = vae.decode(z, causal)
    tiled = decode_tiled(vae, z, causal, Tiling(side=160, side_stride=96, frames=64, frames_stride=32))
    error = (tiled - whole).norm() / whole.norm()
    # Borders reach far into a tile of random convolutions: 3 to 5 % measured, and 30 to 38 % on latents that are noise.
    assert 0 < error < 0.08


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"side": 64, "side_stride": 64}, "less than all"),
        ({"frames": 96, "frames_stride": 40}, "at least half"),
        ({"side": 500, "side_stride": 448}, "multiples of"),
        ({"frames": 96, "frames_stride": 60}, "multiples of"),
    ],
)
def test_unusable_tiles(vae: VideoVAE, tiling: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_tiled(vae, latents(20, 2, 2), False, Tiling(**tiling))

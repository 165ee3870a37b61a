"""Video VAE against diffusers: names, encoder, decoder, 8-bit pixels, bad input."""

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import VAEConfig
from sanawm.errors import InputError, UserError
from sanawm.model.vae import VideoVAE, to_uint8
from sanawm.model.vae.blocks import depth_to_space, patchify, space_to_depth, unpatchify

TINY = VAEConfig(
    latent_channels=16, encoder_widths=(16, 32, 32, 64), encoder_layers=(1,) * 5, decoder_widths=(16, 32, 64), decoder_layers=(1,) * 4
)
# Every downsampler averages groups of another size than in TINY, and batch, channels and layers differ.
SMALL = VAEConfig(
    latent_channels=8,
    encoder_widths=(16, 16, 32, 32),
    encoder_layers=(2, 1, 1, 2, 1),
    decoder_widths=(16, 32, 64),
    decoder_layers=(1, 2, 1, 2),
)


def make_vae(config: VAEConfig, seed: int = 0) -> VideoVAE:
    """A VAE whose parameters and statistics are all random and none special."""
    vae = VideoVAE(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    vae.latents_mean.copy_(torch.randn(config.latent_channels, generator=generator))
    vae.latents_std.copy_(torch.rand(config.latent_channels, generator=generator) + 0.5)
    return vae


def make_oracle(config: VAEConfig, causal: bool) -> Any:
    oracle: Any = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        block_out_channels=config.encoder_widths,
        layers_per_block=config.encoder_layers,
        decoder_block_out_channels=config.decoder_widths,
        decoder_layers_per_block=config.decoder_layers,
        decoder_causal=causal,
    )
    return oracle.eval()


def expected_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, written out from the sizes in the configuration."""
    shapes: dict[str, tuple[int, ...]] = {"latents_mean": (config.latent_channels,), "latents_std": (config.latent_channels,)}

    def conv(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, 3, 3, 3)
        shapes[f"{name}.conv.bias"] = (outputs,)

    def resnets(name: str, width: int, count: int) -> None:
        for layer in range(count):
            conv(f"{name}.resnets.{layer}.conv1", width, width)
            conv(f"{name}.resnets.{layer}.conv2", width, width)

    width = config.latent_channels
    conv("encoder.conv_in", 48, width)
    for block, (out, volume) in enumerate(zip(config.encoder_widths, (4, 2, 8, 8), strict=True)):
        resnets(f"encoder.down_blocks.{block}", width, config.encoder_layers[block])
        conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", width, out // volume)
        width = out
    resnets("encoder.mid_block", width, config.encoder_layers[4])
    conv("encoder.conv_out", width, config.latent_channels + 1)

    width = config.decoder_widths[2]
    conv("decoder.conv_in", config.latent_channels, width)
    resnets("decoder.mid_block", width, config.decoder_layers[3])
    for block in range(3):
        conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", width, 4 * width)
        width //= 2
        resnets(f"decoder.up_blocks.{block}", width, config.decoder_layers[2 - block])
    conv("decoder.conv_out", width, 48)
    return shapes


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("config", [VAEConfig(), TINY, SMALL], ids=["full", "tiny", "small"])
def test_names_and_shapes(config: VAEConfig) -> None:
    with torch.device("meta"):
        vae, oracle = VideoVAE(config), make_oracle(config, causal=True)
    assert shapes_of(vae) == expected_shapes(config) == shapes_of(oracle)


def test_full_size_count() -> None:
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig())
    assert sum(math.prod(shape) for shape in shapes_of(vae).values()) == 1_222_479_857


@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tiny", "small"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_decoder_against_diffusers(config: VAEConfig, causal: bool) -> None:
    vae, oracle = make_vae(config), make_oracle(config, causal)
    oracle.load_state_dict(vae.state_dict(), strict=True)
    z = torch.randn(2, config.latent_channels, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    denormalised = z * oracle.latents_std.view(1, -1, 1, 1, 1) + oracle.latents_mean.view(1, -1, 1, 1, 1)
    expected = oracle.decode(denormalised).sample
    got = vae.decode(z, causal)
    assert got.shape == (2, 3, 17, 64, 96)
    # fp32 rounding through some 20 convolutions at outputs of about 3: 2e-6 measured.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    # The other mode is a different function, so the comparison above can tell them apart.
    assert (vae.decode(z, not causal) - expected).abs().max() > 0.1


@torch.no_grad()
def test_decode_follows_the_configuration() -> None:
    vae = make_vae(TINY)
    z = torch.randn(1, TINY.latent_channels, 2, 2, 2)
    assert torch.equal(vae.decode(z), vae.decode(z, causal=True))


@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tiny", "small"])
@pytest.mark.parametrize("frames", [1, 17])
@torch.no_grad()
def test_encoder_against_diffusers(config: VAEConfig, frames: int) -> None:
    vae, oracle = make_vae(config), make_oracle(config, causal=True)
    oracle.load_state_dict(vae.state_dict(), strict=True)
    video = torch.rand(2, 3, frames, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    posterior = oracle.encode(video).latent_dist
    moments = vae.encoder(video)
    # fp32 rounding through some 20 convolutions at outputs of about 2: 1e-6 measured.
    torch.testing.assert_close(moments[:, :-1], posterior.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(moments[:, -1:].expand_as(posterior.logvar), posterior.logvar, atol=1e-5, rtol=0)
    expected = (posterior.mode() - oracle.latents_mean.view(1, -1, 1, 1, 1)) / oracle.latents_std.view(1, -1, 1, 1, 1)
    got = vae.encode_mode(video)
    assert got.shape == (2, config.latent_channels, (frames - 1) // 8 + 1, 2, 3)
    # The same, divided by standard deviations down to 0.5.
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_scaling_factor_cancels() -> None:
    plain, scaled = make_vae(TINY), make_vae(TINY)
    scaled.scaling_factor = 0.25
    video = torch.rand(1, 3, 1, 64, 64) * 2 - 1
    z = plain.encode_mode(video)
    torch.testing.assert_close(scaled.encode_mode(video), z * 0.25, atol=1e-6, rtol=1e-6)  # one rounding
    torch.testing.assert_close(scaled.decode(z * 0.25), plain.decode(z), atol=1e-5, rtol=0)  # as against diffusers


@torch.no_grad()
def test_bfloat16_stays_close() -> None:
    vae = make_vae(TINY)
    z = torch.randn(1, TINY.latent_channels, 2, 2, 3)
    expected = vae.decode(z)
    got = vae.to(torch.bfloat16).decode(z.bfloat16())
    assert got.dtype == torch.bfloat16
    # bf16 keeps 8 bits: 0.4 % a rounding, about 20 of them in a row.
    assert (got.float() - expected).norm() < 0.04 * expected.norm()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_patches_keep_every_pixel(batch: int, channels: int, frames: int, side: int, patch: int) -> None:
    x = torch.randn(batch, channels, frames, side * patch, (side + 1) * patch)
    patches = patchify(x, patch)
    assert torch.equal(unpatchify(patches, patch), x)
    # Channel, then column in the patch, then row in the patch.
    row, column = patch - 1, patch // 2
    index = (channels - 1) * patch**2 + column * patch + row
    assert torch.equal(patches[:, index], x[:, channels - 1, :, row::patch, column::patch])


@given(st.integers(1, 2), st.integers(1, 3), st.tuples(*[st.integers(1, 2)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
@settings(max_examples=20, deadline=None)
def test_depth_keeps_every_pixel(batch: int, channels: int, stride: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    t, y, x = stride
    video = torch.randn(batch, channels, size[0] * t, size[1] * y, size[2] * x)
    deep = space_to_depth(video, stride)
    assert torch.equal(depth_to_space(deep, stride), video)
    last = channels * t * y * x - 1
    assert torch.equal(deep[:, last], video[:, -1, t - 1 :: t, y - 1 :: y, x - 1 :: x])


def test_uint8_is_diffusers_rounding() -> None:
    # All 8-bit levels, ties between them and values outside.
    video = torch.cat([torch.linspace(-1.1, 1.1, 4000), (torch.arange(511) / 255 - 1)]).reshape(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1)
    frame = VideoProcessor().postprocess_video(video, output_type="pil")[0][0]
    expected = torch.tensor(list(frame.tobytes()), dtype=torch.uint8).reshape(1, -1, 3)
    assert torch.equal(to_uint8(video)[0, :, 0].permute(1, 2, 0), expected)


@given(st.floats(-4, 4, width=32))
def test_uint8_is_the_nearest_level(value: float) -> None:
    exact = min(max((value + 1) * 127.5, 0), 255)
    # Half a level, plus fp32 rounding of numbers up to 255.
    assert abs(int(to_uint8(torch.tensor(value))) - exact) <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 64, 64), (1, 3, 9, 60, 64), (1, 3, 9, 64, 48), (1, 4, 9, 64, 64), (3, 9, 64, 64), (1, 3, 9, 0, 64)]
)
def test_video_of_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"8k\+1 frames"):
        VideoVAE(TINY).encode_mode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 1, 1, 4), (1, 8, 1, 4, 4), (16, 1, 4, 4), (1, 16, 0, 4, 4)])
def test_latent_of_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="at least 2 rows and columns"):
        VideoVAE(TINY).decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_widths": (16, 32, 32)}, "4 widths"),
        ({"encoder_widths": (18, 32, 32, 64)}, "from 16 to 18 channels"),
        ({"encoder_widths": (16, 64, 32, 64)}, "from 16 to 64 channels"),
        ({"decoder_layers": (1, 1, 1)}, "4 layer counts"),
        ({"decoder_widths": (16, 32, 48)}, "double"),
        ({"decoder_widths": (12, 24, 48)}, "multiple of 8"),
        ({"temporal_stride": 4}, "temporal stride"),
    ],
)
def test_impossible_configuration(change: dict[str, object], message: str) -> None:
    values = {**vars(TINY), **change}
    with pytest.raises(UserError, match=message):
        VideoVAE(VAEConfig(**values))  # type: ignore[arg-type]

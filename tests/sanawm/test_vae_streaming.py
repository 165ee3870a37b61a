"""Streaming decoder of the video VAE against whole-clip decoding, its state, its export."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import VAEConfig, tiny_config
from sanawm.errors import InputError
from sanawm.model.vae import FirstFrameDecoder, NextFrameDecoder, StreamingDecoder, VideoVAE
from sanawm.model.vae.blocks import VideoConv
from sanawm.vae_state import decoder_convs, state_shapes
from sanawm_runtime.engines.onnxruntime import session_options

CONFIG = tiny_config().vae
# fp32 rounding through 13 convolutions at outputs of about 3: 2e-6 measured.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    """A VAE whose decoder's parameters and statistics are all random and none special."""
    vae = VideoVAE(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.decoder.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    vae.latents_mean.copy_(torch.randn(CONFIG.latent_channels, generator=generator))
    vae.latents_std.copy_(torch.rand(CONFIG.latent_channels, generator=generator) + 0.5)
    return vae


def latents(frames: int, h: int = 2, w: int = 3, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, CONFIG.latent_channels, frames, h, w, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_frame_by_frame_is_full_decode(vae: VideoVAE) -> None:
    z = latents(6, h=3, w=4, batch=2)
    segments = list(StreamingDecoder(vae).segments(z))
    assert [segment.shape[2] for segment in segments] == [1, 8, 8, 8, 8, 8]
    torch.testing.assert_close(torch.cat(segments, dim=2), vae.decode(z, causal=True), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_exact_in_double_precision(vae: VideoVAE) -> None:
    double = copy.deepcopy(vae).double()
    z = latents(4).double()
    streamed = torch.cat(list(StreamingDecoder(double).segments(z)), dim=2)
    # The same numbers summed in another order: what is left is fp64 rounding, so nothing larger hides under fp32's.
    torch.testing.assert_close(streamed, double.decode(z, causal=True), atol=1e-13, rtol=0)


@given(st.integers(1, 2), st.integers(2, 4), st.integers(2, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_parts_of_any_length(vae: VideoVAE, batch: int, h: int, w: int, lengths: list[int]) -> None:
    z = latents(sum(lengths), h, w, batch)
    decoder = StreamingDecoder(vae)
    first, *rest = z.split(lengths, dim=2)
    pixels, state = decoder.decode_first(first)
    parts = [pixels]
    for part in rest:
        pixels, state = decoder.decode_next(part, state)
        parts.append(pixels)
        assert [tuple(tensor.shape) for tensor in state] == [shape for _, shape in state_shapes(CONFIG, h, w, batch)]
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(z, causal=True), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_state_is_what_each_convolution_read(vae: VideoVAE) -> None:
    decoder = StreamingDecoder(vae)
    read: list[tuple[str, torch.Tensor]] = []
    names = {module: name for name, module in decoder.decoder.named_modules() if isinstance(module, VideoConv)}
    hooks = [module.register_forward_pre_hook(lambda module, args: read.append((names[module], args[0]))) for module in names]
    _, state = decoder.decode_first(latents(1))
    _, state = decoder.decode_next(latents(1, seed=2), state)
    for hook in hooks:
        hook.remove()
    shapes = state_shapes(CONFIG, 2, 3)
    assert [name for name, _ in read] == [name for name, _ in shapes] * 2
    first, second = read[: len(shapes)], read[len(shapes) :]
    for (name, shape), (_, before), (_, after), kept in zip(shapes, first, second, state, strict=True):
        assert tuple(kept.shape) == shape, name
        assert torch.equal(kept, torch.cat([before, before, after], dim=2)[:, :, -2:]), name
        # Its own memory, not a window on the frames it came from.
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size(), name


def test_full_size_state() -> None:
    shapes = state_shapes(VAEConfig(), 22, 40)
    assert len(shapes) == len(decoder_convs(VAEConfig())) == 45
    assert shapes[0] == ("conv_in", (1, 128, 2, 22, 40))
    assert shapes[-1] == ("conv_out", (1, 128, 2, 176, 320))
    with torch.device("meta"):
        decoder = VideoVAE(VAEConfig()).decoder
    convs = [(name, module.conv) for name, module in decoder.named_modules() if isinstance(module, VideoConv)]
    channels = {conv.name: (conv.in_channels, conv.out_channels) for conv in decoder_convs(VAEConfig())}
    assert channels == {name: (conv.in_channels, conv.out_channels) for name, conv in convs}


@torch.no_grad()
def test_streams_do_not_mix(vae: VideoVAE) -> None:
    decoder = StreamingDecoder(vae)
    one, two = latents(3, seed=3), latents(3, seed=4)
    alone = list(decoder.segments(one))
    mixed = [left for left, _ in zip(decoder.segments(one), decoder.segments(two), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


@torch.no_grad()
def test_state_given_is_left_alone(vae: VideoVAE) -> None:
    decoder = StreamingDecoder(vae)
    _, state = decoder.decode_first(latents(1))
    before = [tensor.clone() for tensor in state]
    first, _ = decoder.decode_next(latents(1, seed=2), state)
    again, _ = decoder.decode_next(latents(1, seed=2), state)
    assert torch.equal(first, again)
    assert all(torch.equal(tensor, old) for tensor, old in zip(state, before, strict=True))


def test_only_the_decoder_is_exported(vae: VideoVAE) -> None:
    names = set(NextFrameDecoder(vae).state_dict())
    assert names == {name for name in vae.state_dict() if not name.startswith("encoder.")}


@torch.no_grad()
def test_compiled_stream_stays_right(vae: VideoVAE) -> None:
    z = latents(4)
    first = torch.compile(FirstFrameDecoder(vae), backend="eager", fullgraph=True)
    following = torch.compile(NextFrameDecoder(vae), backend="eager", fullgraph=True)
    pixels, *state = first(z[:, :, :1])
    parts = [pixels]
    for frame in (1, 2, 3):
        pixels, *state = following(z[:, :, frame : frame + 1], *state)
        parts.append(pixels)
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(z, causal=True), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_onnx_stream_is_torch_stream(vae: VideoVAE, tmp_path: Path) -> None:
    z = latents(4)
    first, following = FirstFrameDecoder(vae).eval(), NextFrameDecoder(vae).eval()
    expected, *state = first(z[:, :, :1])
    exported = torch.export.export(following, (z[:, :, :1], *state), strict=False)
    sessions = [to_onnx(torch.export.export(first, (z[:, :, :1],), strict=False), tmp_path / "first"), to_onnx(exported, tmp_path / "next")]
    got = run(sessions[0], z[:, :, :1])
    assert_close_to(got, [expected, *state])
    for frame in (1, 2, 3):
        part = z[:, :, frame : frame + 1]
        expected, *state = following(part, *state)
        assert_close_to(list(exported.module()(part, *map(torch.from_numpy, got[1:]))), [expected, *state])
        got = run(sessions[1], part, *got[1:])
        assert_close_to(got, [expected, *state])


@torch.no_grad()
def test_onnx_keeps_the_norm_epsilon(tmp_path: Path) -> None:
    # A black latent under zero biases normalises zeros at every layer: without the epsilon that is 0/0.
    vae = VideoVAE(CONFIG).eval().requires_grad_(False)
    for name, parameter in vae.decoder.named_parameters():
        parameter.mul_(0 if name.endswith("bias") else 1)
    z = torch.zeros(1, CONFIG.latent_channels, 1, 2, 2)
    session = to_onnx(torch.export.export(FirstFrameDecoder(vae).eval(), (z,), strict=False), tmp_path / "first")
    assert all(np.array_equal(output, np.zeros_like(output)) for output in run(session, z))


def to_onnx(program: torch.export.ExportedProgram, path: Path) -> onnxruntime.InferenceSession:
    converted = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False)
    assert converted is not None
    converted.save(path.with_suffix(".onnx"))
    return onnxruntime.InferenceSession(path.with_suffix(".onnx"), session_options(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, *inputs: torch.Tensor | np.ndarray) -> list[np.ndarray]:
    return session.run(None, {node.name: np.asarray(value) for node, value in zip(session.get_inputs(), inputs, strict=True)})


def assert_close_to(got: list, expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        # fp32 with sums in another order; the bar for ONNX Runtime against torch.
        assert np.abs(np.asarray(left) - np.asarray(right)).max() <= 2e-5 * np.abs(np.asarray(right)).max()


def test_shapes_need_no_torch() -> None:
    code = "import sys; sys.modules.update(torch=None, numpy=None); from sanawm.vae_state import *; print(len(decoder_convs(VAEConfig())))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "45\n"


@torch.no_grad()
def test_state_of_another_stream(vae: VideoVAE) -> None:
    decoder = StreamingDecoder(vae)
    _, state = decoder.decode_first(latents(1))
    with pytest.raises(InputError, match="13 tensors, found 12"):
        decoder.decode_next(latents(1), state[:-1])
    with pytest.raises(InputError, match="state for conv_in has shape"):
        decoder.decode_next(latents(1, h=4), state)
    with pytest.raises(InputError, match="state for conv_in has shape"):
        decoder.decode_next(latents(1, batch=2), state)
    with pytest.raises(InputError, match="latents of shape"):
        decoder.decode_next(latents(1)[0], state)
    with pytest.raises(InputError, match="latents of shape"):
        decoder.decode_first(latents(1, w=1))


@pytest.mark.parametrize("size", [(1, 4), (4, 1), (0, 0)])
def test_latent_too_small_for_a_state(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="at least 2x2"):
        state_shapes(CONFIG, *size)

"""Samplers: on flows whose end is known, on the real transformer against a loop written out, and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sanawm.config import DiTConfig, StreamConfig
from sanawm.model.sampler import StreamStep, bidirectional, camera_features, chunk_causal, stream
from sanawm.schedule import bidirectional_sigmas

SMALL = DiTConfig(
    in_channels=4, hidden=32, depth=2, softmax_every=2, head_dim=16, cross_heads=2, caption_channels=8, text_tokens=5, height=2, width=3
)


@dataclass
class Straight:
    """A model whose flow goes straight to a target for each prompt; it writes down what it was asked."""

    config: DiTConfig
    noise: Tensor
    targets: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.rows: list[tuple[str, Tensor]] = []

    def encode_camera(self, camera: Tensor, plucker: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return camera

    def __call__(self, x: Tensor, row: Tensor, text: str, camera: Any, **options: Any) -> tuple[Tensor, Any]:
        self.rows.append((text, row.clone()))
        frames = x.shape[2]
        return (self.noise - self.targets[text])[:, :, :frames], ()


def tensors(frames: int, count: int, seed: int = 0) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return iter(torch.randn(count, 1, 4, frames, 2, 3, generator=random))


def straight(frames: int, **change: Any) -> tuple[Straight, Tensor]:
    noise, target, other = tensors(frames, 3)
    return Straight(replace(SMALL, **change), noise, {"prompt": target, "": other}), noise


def test_teacher_follows_the_flow_to_its_end() -> None:
    model, noise = straight(5)
    seen: list[tuple[int, int]] = []
    out = bidirectional(model, noise, "prompt", None, guidance=1.0, progress=lambda i, n: seen.append((i, n)))  # type: ignore[arg-type]
    # Sixty float32 steps along a line.
    torch.testing.assert_close(out[:, :, 1:], model.targets["prompt"][:, :, 1:], atol=1e-5, rtol=0)
    assert out[:, :, 0].numpy().tobytes() == noise[:, :, 0].numpy().tobytes()
    assert seen == [(i, 60) for i in range(1, 61)] and len(model.rows) == 60
    rows = torch.cat([row for _, row in model.rows])
    assert rows.shape == (60, 5) and not rows[:, 0].any() and torch.equal(rows[:, 1], rows[:, 4])
    np.testing.assert_array_equal(rows[:, 1].numpy(), bidirectional_sigmas()[:-1] * np.float32(1000))


@pytest.mark.parametrize("sampler", ["bidirectional", "chunk_causal"])
def test_guidance(sampler: str) -> None:
    model, noise = straight(6)
    if sampler == "bidirectional":
        out = bidirectional(model, noise, "prompt", None, negative="", guidance=3.0, steps=8)  # type: ignore[arg-type]
    else:
        camera = torch.zeros(1, 6, 20)
        out = chunk_causal(model, noise, "prompt", camera, torch.zeros(1, 48, 6, 2, 3), negative="", guidance=3.0, steps=8)  # type: ignore[arg-type]
    prompt, negative = model.targets["prompt"], model.targets[""]
    # v = v_u + g (v_c - v_u) of two straight flows is the straight flow to the same mixture of their ends.
    expected = negative + 3 * (prompt - negative)
    torch.testing.assert_close(out[:, :, 1:], expected[:, :, 1:], atol=1e-5, rtol=0)
    assert {name for name, _ in model.rows} == {"prompt", ""}


def test_guidance_needs_a_negative_prompt() -> None:
    model, noise = straight(3)
    with pytest.raises(ValueError, match="negative prompt"):
        bidirectional(model, noise, "prompt", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative prompt"):
        chunk_causal(model, noise, "prompt", torch.zeros(1, 3, 20), torch.zeros(1, 48, 3, 2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mask", "skipped"), [("float32", 0), ("bfloat16", 2)])
def test_condition_mask_dtype(mask: str, skipped: int) -> None:
    model, noise = straight(4, condition_mask_dtype=mask)
    out = bidirectional(model, noise, "prompt", None, guidance=1.0)  # type: ignore[arg-type]
    sigmas = bidirectional_sigmas()
    left = 1 - float(sigmas[skipped])  # of the way, never gone
    expected = model.targets["prompt"] + left * (noise - model.targets["prompt"])
    torch.testing.assert_close(out[:, :, 1:], expected[:, :, 1:], atol=1e-5, rtol=0)
    assert torch.equal(out[:, :, 0], noise[:, :, 0])


def test_teacher_rounds_to_the_latents_dtype() -> None:
    model, noise = straight(3)
    out = bidirectional(model, noise.bfloat16(), "prompt", None, guidance=1.0, steps=4)  # type: ignore[arg-type]
    x = noise.bfloat16()
    sigmas = bidirectional_sigmas(4)
    for a, b in pairwise(sigmas):
        stepped = (x.float() - (float(a) - float(b)) * (noise - model.targets["prompt"])).bfloat16()
        x = torch.cat((x[:, :, :1], stepped[:, :, 1:]), 2)
    assert out.dtype == torch.bfloat16 and torch.equal(out, x)


@pytest.mark.parametrize("frames", [4, 5, 6, 7])
def test_distilled_sampler_follows_the_flow(frames: int) -> None:
    noise, target = tensors(frames, 2)

    class Model(Straight):
        def __call__(self, x: Tensor, row: Tensor, text: str, camera: Any, **options: Any) -> tuple[Tensor, Any]:
            self.rows.append((text, row.clone()))
            start = int(camera[0, 0, 0])
            return (self.noise - self.targets[text])[:, :, start : start + x.shape[2]], ()

    camera = torch.arange(frames)[None, :, None].expand(1, -1, 20).float()
    model = Model(SMALL, noise, {"prompt": target})
    steps = list(stream(model, noise, "prompt", camera, torch.zeros(1, 48, frames, 2, 3)))  # type: ignore[arg-type]
    out = torch.cat([s.latents for s in steps], 2)
    torch.testing.assert_close(out[:, :, 1:], target[:, :, 1:], atol=1e-6, rtol=0)
    assert out[:, :, 0].numpy().tobytes() == noise[:, :, 0].numpy().tobytes()
    # Five forwards a chunk, the last of them clean; the clip's first frame is clean in all.
    assert [int(row[0, -1]) for _, row in model.rows] == [1000, 960, 889, 727, 0] * len(steps)
    assert all((row[0, 0] == 0) == (i < 5 or row[0, -1] == 0) for i, (_, row) in enumerate(model.rows))


SPANS = [(0, 4), (4, 7), (7, 10), (10, 13), (13, 16)]


def by_hand(model: Any, clip: Any, windows: list[list[int]], timesteps: Any, sigmas: Any) -> tuple[list[Tensor], list[Any]]:
    """The distilled sampler written out, with every state kept whole."""
    latents: list[Tensor] = []
    states: list[Any] = []
    text = clip.features(model)
    for (start, end), wanted in zip(SPANS, windows, strict=True):
        camera = camera_features(model, clip.camera, clip.plucker, start, end)
        past = [states[i] for i in wanted]
        x = clip.latents[:, :, start:end]
        for t, (a, b) in zip(timesteps, pairwise(sigmas), strict=True):
            row = torch.full((1, end - start), float(t))
            if start == 0:
                row[0, 0] = 0
            stepped = x - (a - b) * model(x, row, text, camera, past=past)[0]
            x = torch.cat((x[:, :, :1], stepped[:, :, 1:]), 2) if start == 0 else stepped
        states.append(model(x, torch.zeros(1, end - start), text, camera, past=past)[1])
        latents.append(x)
    return latents, states


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (StreamConfig(), [[], [0], [0, 1], [0, 2], [0, 3]]),
        (StreamConfig(sink=False), [[], [0], [0, 1], [1, 2], [2, 3]]),
        (StreamConfig(cached_chunks=-1), [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (StreamConfig(cached_chunks=3), [[], [0], [0, 1], [0, 1, 2], [0, 2, 3]]),
        (StreamConfig(timesteps=(1000, 500), sigmas=(1.0, 0.5, 0.0)), [[], [0], [0, 1], [0, 2], [0, 3]]),
    ],
    ids=["released", "no-sink", "all", "three", "two-steps"],
)
def test_distilled_sampler_is_the_loop_written_out(config: StreamConfig, windows: list[list[int]], make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL, 2, torch.float64), make_clip(SMALL, 16, 2, torch.float64)
    steps = list(stream(model, clip.latents, clip.features(model), clip.camera, clip.plucker, config))
    latents, states = by_hand(model, clip, windows, config.timesteps, config.sigmas)
    assert [(s.chunk.start, s.chunk.end) for s in steps] == SPANS
    for step, x, state in zip(steps, latents, states, strict=True):
        # The same float64 arithmetic.
        torch.testing.assert_close(step.latents, x, atol=1e-12, rtol=0)
        for ours, theirs in zip(step.state, state, strict=True):
            assert ours.tensors().keys() == theirs.tensors().keys()
            for name, tensor in theirs.tensors().items():
                torch.testing.assert_close(ours.tensors()[name], tensor, atol=1e-12, rtol=0)


def test_the_window_matters(make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL, 2, torch.float64), make_clip(SMALL, 16, 2, torch.float64)

    def run(config: StreamConfig) -> list[StreamStep]:
        return list(stream(model, clip.latents, clip.features(model), clip.camera, clip.plucker, config))

    released, everything, no_sink = run(StreamConfig()), run(StreamConfig(cached_chunks=-1)), run(StreamConfig(sink=False))
    for i in range(5):
        assert torch.equal(released[i].latents, everything[i].latents) == torch.equal(released[i].latents, no_sink[i].latents) == (i < 3)


def test_distilled_sampler_never_mixes_chunks_ahead(make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL, 3), make_clip(SMALL, 7, 3)
    latents = clip.latents.clone()
    latents[:, :, 4:] += 1
    runs = [list(stream(model, x, clip.features(model), clip.camera, clip.plucker)) for x in (clip.latents, latents)]
    assert torch.equal(runs[0][0].latents, runs[1][0].latents) and not torch.equal(runs[0][1].latents, runs[1][1].latents)
    assert all(torch.equal(run[0].latents[:, :, 0], clip.latents[:, :, 0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_not_modified(dtype: torch.dtype, make_model: Any, make_clip: Any) -> None:
    model, clip = make_model(SMALL, 1, dtype), make_clip(SMALL, 4, 1)
    noise = clip.latents.to(dtype)
    kept, text = noise.clone(), clip.features(model)
    list(stream(model, noise, text, clip.camera, clip.plucker))
    bidirectional(model, noise, text, camera_features(model, clip.camera, clip.plucker, 0, 4), guidance=1.0, steps=2)
    chunk_causal(model, noise, text, clip.camera, clip.plucker, guidance=1.0, steps=2)
    assert torch.equal(noise, kept)


def test_one_chunk_of_the_chunk_causal_teacher_is_bidirectional(make_model: Any, make_clip: Any) -> None:
    for frames in (1, 3, 5):
        model, clip = make_model(SMALL, 1), make_clip(SMALL, frames, 1)
        text, negative = clip.features(model), model.encode_text(clip.text.flip(1), clip.mask)
        camera = camera_features(model, clip.camera, clip.plucker, 0, frames)
        options: dict[str, Any] = {"negative": negative, "guidance": 4.0, "steps": 5}
        dense = bidirectional(model, clip.latents, text, camera, **options)
        causal = chunk_causal(model, clip.latents, text, clip.camera, clip.plucker, **options)
        assert torch.equal(dense, causal)
        assert torch.equal(causal[:, :, 0], clip.latents[:, :, 0]) and (frames == 1 or not torch.equal(causal, clip.latents))


def test_chunk_causal_schedule() -> None:
    """Chunk i starts at step int(i * steps / chunks), only chunks that started are evaluated, and finished ones stay at zero."""
    frames, steps = 13, 10  # chunks of 4, 3, 3, 3 frames
    model, noise = straight(frames)
    out = chunk_causal(model, noise, "prompt", torch.zeros(1, frames, 20), torch.zeros(1, 48, frames, 2, 3), guidance=1.0, steps=steps)  # type: ignore[arg-type]
    torch.testing.assert_close(out[:, :, 1:], model.targets["prompt"][:, :, 1:], atol=1e-5, rtol=0)
    starts, ends = [0, 2, 5, 7], [4, 7, 10, 13]
    sigmas = bidirectional_sigmas(steps)
    assert len(model.rows) == starts[-1] + steps
    for step, (_, row) in enumerate(model.rows):
        active = [i for i, s in enumerate(starts) if s <= step]
        assert row.shape[1] == ends[active[-1]] and row[0, 0] == 0
        for i in active:
            level = min(step - starts[i], steps)
            # Python multiplies in float64 and torch stores float32.
            np.testing.assert_allclose(row[0, ends[i] - 1].item(), 1000 * float(sigmas[level]), rtol=1e-7)

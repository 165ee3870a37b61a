"""The encoders' launch plans, executed by the kernels' plain definitions, against the torch models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sanawm.config import WorldConfig, tiny_config
from sanawm.errors import UserError
from sanawm.keys import text_tensors, vae_tensors
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE
from sanawm.programs import Geometry, Program, programs
from sanawm.vae_state import DOWN_STRIDES
from sanawm_export.cuda import arena, reference
from sanawm_export.cuda.image_weights import ImageWeights
from sanawm_export.cuda.lower import lower_encoders
from sanawm_export.cuda.tape import Lowered
from sanawm_export.cuda.text_weights import TextWeights, check_text_settings
from sanawm_export.onnx.modules import ImageEncoderProgram, TextEncoderProgram
from sanawm_kernels.aot.spec import PRESETS, KernelVariant, all_variants
from sanawm_kernels.image import plans as image_plans
from sanawm_kernels.image.plans import STRIDES
from sanawm_kernels.text import plans as text_plans
from sanawm_runtime.engines._cuda_pack import Packed, Source
from sanawm_runtime.engines._cuda_plan import Launch, Plan

SEED = 3
L, K = 48, 40


def world() -> WorldConfig:
    """The tiny one with fewer text tokens."""
    tiny = tiny_config()
    return replace(tiny, dit=replace(tiny.dit, text_tokens=K))


@cache
def source(part: str) -> dict[str, Tensor]:
    """Weights that bfloat16 can hold."""
    table = text_tensors(world().text) if part == "text" else vae_tensors(world().vae)
    return {name: torch.from_numpy(synth_tensor(name, info.shape, SEED)).bfloat16().float() for name, info in table.items()}


class Lab:
    """Plans, packed weights and torch models in `dtype`."""

    def __init__(self, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)
        geometry = Geometry(world(), L, 4, dtype)
        self.programs = programs(geometry, ("text", "vae"))
        text, image = TextWeights(world().text, dtype), ImageWeights(world().vae, dtype)
        self.lowered = lower_encoders(geometry, text, image, 90)
        self.packed = {"text_encoder": self._packed(text.tensors, "text"), "image_encoder": self._packed(image.tensors, "vae")}
        encoder = TextEncoder.from_config(world().text, K)
        encoder.model.load_state_dict(source("text"))
        vae = VideoVAE(world().vae)
        vae.load_state_dict(source("vae"))
        self.models = {
            "text_encoder": TextEncoderProgram(self.programs["text_encoder"], encoder.to(self.dtype)),
            "image_encoder": ImageEncoderProgram(self.programs["image_encoder"], vae.to(self.dtype).eval()),
        }

    def _packed(self, tensors: dict[str, Packed], part: str) -> dict[str, Tensor]:
        return {n: torch.from_numpy(p.make(lambda name, _: source(part)[name].numpy())).view(getattr(torch, p.dtype)) for n, p in tensors.items()}

    def plan(self, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return reference.run(self.lowered[name], inputs, self.packed[name])

    @torch.no_grad()
    def model(self, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.models[name].compute(inputs)


@pytest.fixture(scope="module")
def exact() -> Lab:
    return Lab("float32")


@pytest.fixture(scope="module")
def half() -> Lab:
    return Lab("bfloat16")


def inputs_of(program: Program, real: int = 31) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    if program.name == "image_encoder":
        return {"image": 2 * torch.rand(program.input("image").shape, generator=generator) - 1}
    ids = torch.randint(0, world().text.vocab, (1, L), generator=generator)
    mask = (torch.arange(L) < real).long()[None]
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("real", [5, 31, L])
def test_the_float32_text_plan_equals_the_model(exact: Lab, real: int) -> None:
    inputs = inputs_of(exact.programs["text_encoder"], real)
    got, want = exact.plan("text_encoder", inputs), exact.model("text_encoder", inputs)
    assert torch.equal(got["text_mask"], want["text_mask"])
    # Sums in another order; a frequency may be one unit in the last place off, 3e-6 radians at position 47.
    assert error(got["text"], want["text"]) < 1e-5


def test_the_float32_image_plan_equals_the_model(exact: Lab) -> None:
    inputs = inputs_of(exact.programs["image_encoder"])
    got, want = exact.plan("image_encoder", inputs), exact.model("image_encoder", inputs)
    # Sums of up to 9 * 64 products in another order through 15 layers; the time taps are summed before and not after.
    assert error(got["latents"], want["latents"]) < 1e-5


@pytest.mark.parametrize(("name", "output"), [("text_encoder", "text"), ("image_encoder", "latents")])
def test_bfloat16_plans_are_as_close_to_float32_as_the_bfloat16_models(exact: Lab, half: Lab, name: str, output: str) -> None:
    inputs = inputs_of(exact.programs[name])
    truth = exact.model(name, inputs)[output]
    ours, theirs = error(half.plan(name, inputs)[output], truth), error(half.model(name, inputs)[output], truth)
    # Fewer roundings in the plan (of the summed time taps one more); a quarter more is scatter.
    assert 0 < ours < 1.25 * theirs


def test_padding_and_what_comes_later_do_not_matter(exact: Lab) -> None:
    """The embedding of a real token depends on the real tokens before it."""
    inputs = inputs_of(exact.programs["text_encoder"])
    other = dict(inputs, input_ids=torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 9))
    a, b = (exact.plan("text_encoder", x) for x in (inputs, other))
    real = a["text_mask"][0]
    assert torch.equal(a["text"][0, real], b["text"][0, real]) and not torch.equal(a["text"], b["text"])


def full(dtype: str = "bfloat16") -> dict[str, Lowered]:
    config = WorldConfig()
    return lower_encoders(Geometry(config, 560, 4, dtype), TextWeights(config.text, dtype), ImageWeights(config.vae, dtype), 90)


def test_arenas_are_sound_and_small(exact: Lab, half: Lab) -> None:
    for lowered in (*exact.lowered.values(), *half.lowered.values(), *full().values()):
        arena.check(lowered.plan)
        assert arena.peak(lowered.plan) <= lowered.plan.arena <= 1.05 * arena.peak(lowered.plan)
        assert Plan.from_json(lowered.plan.to_json()) == lowered.plan


def test_the_full_encoders_cost_what_their_layers_add_up_to() -> None:
    plans = {name: lowered.plan for name, lowered in full().items()}
    c = WorldConfig().text
    text = plans["text_encoder"]
    # Two FLOPs a weight of a layer and token, and the triangle of attention; 2.02e9 weights without the embedding.
    weights = c.layers * (c.hidden * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.hidden * c.intermediate)
    assert weights == pytest.approx(2.02e9, rel=5e-3)
    attention = c.layers * 2 * 560 * 561 * c.heads * c.head_dim
    assert sum(step.flops for step in text.steps) == 2 * 560 * weights + attention
    assert sum(isinstance(step, Launch) for step in text.steps) == 9 * c.layers + 3
    # Of the embedding's 1.2 GB no more than the prompt's rows count as read.
    embed = next(step for step in text.steps if step.label == "embed")
    assert embed.read_bytes <= embed.write_bytes + 560 * 8 + 4 * c.hidden
    # A third of the model's 27-tap convolutions: residual blocks, downsamplers, first and last.
    image = plans["image_encoder"]
    pixels = [176 * 320, 88 * 160, 88 * 160, 44 * 80, 22 * 40]
    blocks = sum(2 * n * p * w * w for n, p, w in zip((4, 6, 6, 2, 2), pixels, (128, 256, 512, 1024, 2048), strict=True))
    between = pixels[0] * 48 * 128 + sum(p * a * b for p, a, b in zip(pixels, (128, 256, 512, 1024, 2048), (64, 256, 128, 256, 128), strict=True))
    assert sum(step.flops for step in image.steps) == 2 * 9 * (blocks + between)


@pytest.mark.parametrize(("name", "target"), [("full", 90), ("full", 120), ("tiny", 90)])
def test_what_the_plans_launch_is_in_the_ahead_of_time_list(name: str, target: int) -> None:
    listed = {variant.name: variant for variant in all_variants(PRESETS[name], target)}
    config = WorldConfig() if name == "full" else tiny_config()
    text, image = TextWeights(config.text, "bfloat16"), ImageWeights(config.vae, "bfloat16")
    for lowered in lower_encoders(Geometry(config, 560, 4, "bfloat16"), text, image, target).values():
        assert {n: v for n, v in lowered.variants.items() if listed.get(n) != v} == {}
    assert STRIDES == DOWN_STRIDES


KINDS, SIZES, MORE = ("bf16", "fp32"), (16, 32), (2, 4)
FAMILIES: list[tuple[Callable[..., KernelVariant], tuple[tuple[Any, ...], ...]]] = [
    (text_plans.embed_rows, (KINDS, SIZES)),
    (text_plans.add_normed, (KINDS, SIZES, (True, False))),
    (text_plans.rotate_halves, (KINDS, MORE, SIZES)),
    (text_plans.causal_attention, (KINDS, (90,), (4, 8), MORE, SIZES)),
    (text_plans.gelu_gated, (KINDS, SIZES)),
    (image_plans.patches, (KINDS, SIZES, SIZES, MORE)),
    (image_plans.frame_conv, (KINDS, (90,), SIZES, SIZES, SIZES, SIZES, tuple(image_plans.MODES))),
    (image_plans.downsample, (KINDS, SIZES, SIZES, SIZES, MORE, tuple(set(STRIDES)))),
]


@pytest.mark.parametrize(("make", "axes"), FAMILIES, ids=[make.__name__ for make, _ in FAMILIES])
def test_names_tell_specialisations_apart(make: Callable[..., KernelVariant], axes: tuple[tuple[Any, ...], ...]) -> None:
    chosen = list(itertools.product(*axes))
    assert len({make(*values).name for values in chosen}) == len(chosen)


def test_a_prompt_beyond_the_local_layers_window_is_refused() -> None:
    geometry = Geometry(world(), 4097, 4, "float32")
    with pytest.raises(UserError, match="up to 4096 tokens, found 4097"):
        lower_encoders(geometry, TextWeights(world().text, "float32"), ImageWeights(world().vae, "float32"), 90)


def test_a_text_encoder_with_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0}}))
    check_text_settings(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 1e6}}))
    with pytest.raises(UserError, match="rope_theta is 1000000.0"):
        check_text_settings(tmp_path)


def test_time_taps_are_summed_after_their_rounding() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 4, 3, 3, 3)).astype(np.float32)
    packed = Packed("w", "float32", (4, 36), "frame_conv", (Source("w", weight.shape),), rounding="bfloat16")
    made = packed.make(lambda name, shape: weight)
    rounded = torch.from_numpy(weight).bfloat16().float()
    want = rounded.sum(2).permute(0, 2, 3, 1).reshape(5, 36)[:4]
    torch.testing.assert_close(torch.from_numpy(made), want, rtol=1e-6, atol=1e-6)

"""The decoder's launch plans, executed by the kernels' plain definitions, against the torch decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sanawm.config import WorldConfig, tiny_config
from sanawm.keys import vae_tensors
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.vae import VideoVAE
from sanawm.programs import Geometry, programs
from sanawm_export.cuda import arena, reference
from sanawm_export.cuda.lower import lower_part_decoder
from sanawm_export.cuda.vae_weights import DecoderWeights
from sanawm_export.onnx.modules import DecodeProgram

NAMES = ("decode_first", "decode", "decode")


def channels_last(state: Tensor) -> Tensor:
    """The engine's state (2, H, W, C) from the model's (1, C, 2, H, W), under the model's shape."""
    return state.permute(0, 2, 3, 4, 1).reshape(state.shape)


# Where convolutions go through descriptors, and where they do not; the small decoder below has channels that descriptors take in bfloat16 too.
TARGETS = (90, 120)


def small() -> WorldConfig:
    world = tiny_config()
    return replace(world, vae=replace(world.vae, decoder_widths=(32, 64, 128)))


def both(dtype: str, target: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(plan's, model's) outputs of three latent frames; each continues from its own state."""
    world = small()
    geometry = Geometry(world, 64, 4, dtype)
    signatures = programs(geometry, ("vae",))
    source = {name: torch.from_numpy(synth_tensor(name, info.shape, 3)).bfloat16().float() for name, info in vae_tensors(world.vae).items()}
    vae = VideoVAE(world.vae)
    vae.load_state_dict(source)
    vae.to(getattr(torch, dtype)).eval().requires_grad_(False)
    weights = DecoderWeights(world.vae, dtype)
    packed = {n: torch.from_numpy(p.make(lambda name, _: source[name].numpy())).view(getattr(torch, p.dtype)) for n, p in weights.tensors.items()}
    lowered = lower_part_decoder(geometry, weights, target)
    assert any(name.endswith(".tma") for name in lowered["decode"].variants) == (target == 90)
    generator = torch.Generator().manual_seed(0)
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    found = []
    for name in NAMES:
        z = torch.randn(signatures[name].input("latents").shape, generator=generator).to(getattr(torch, dtype))
        got = reference.run(lowered[name], {"latents": z, **ours}, packed)
        want = DecodeProgram(signatures[name], vae).compute({"latents": z, **theirs})
        found.append((got, want))
        ours, theirs = ({key.replace("next.", "past."): x for key, x in result.items() if key != "frames"} for result in (got, want))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_float32_frames_and_state_equal_the_model(target: int) -> None:
    for got, want in both("float32", target):
        assert got.keys() == want.keys()
        levels = (got["frames"].int() - want["frames"].int()).abs()
        # A level differs where a value lies within rounding of the middle between two.
        assert levels.max() <= 1 and levels.float().mean() < 1e-4
        for name in got.keys() - {"frames"}:
            want_state = channels_last(want[name])
            # Sums of up to 27 * 96 products in another order.
            assert (got[name] - want_state).norm() < 5e-6 * want_state.norm(), name


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_frames_are_as_close_to_float32_as_the_bfloat16_model(target: int) -> None:
    for (got, want), (_, truth) in zip(both("bfloat16", target), both("float32", target), strict=True):
        ours, theirs = ((x["frames"].float() - truth["frames"].float()).pow(2).mean().sqrt() for x in (got, want))
        # Fewer roundings in the plan; a tenth more is scatter.
        assert 0 < ours < 1.1 * theirs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("world", [tiny_config(), WorldConfig()], ids=["tiny", "full"])
def test_arenas_are_sound(world: WorldConfig, target: int) -> None:
    geometry = Geometry(world, 64, 4, "bfloat16")
    for lowered in lower_part_decoder(geometry, DecoderWeights(world.vae, "bfloat16"), target).values():
        arena.check(lowered.plan)
        assert lowered.plan.arena <= 1.05 * arena.peak(lowered.plan)


@pytest.mark.parametrize("target", TARGETS)
def test_the_full_decoder_costs_what_the_specification_counts(target: int) -> None:
    """9.03 TFLOP of convolutions a steady latent frame at 704x1280 (LTX-2 video VAE)."""
    world = WorldConfig()
    lowered = lower_part_decoder(Geometry(world, 64, 4, "bfloat16"), DecoderWeights(world.vae, "bfloat16"), target)
    assert sum(step.flops for step in lowered["decode"].plan.steps) == pytest.approx(9.025e12, rel=1e-3)

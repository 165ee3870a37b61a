"""Configurations: derived sizes, JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm.config import PRESETS, DiTConfig, StreamConfig, TextConfig, VAEConfig, WorldConfig, preset, tiny_config
from sanawm.errors import UserError


def test_official_sizes() -> None:
    world = WorldConfig()
    dit = world.dit
    assert (dit.heads, dit.tokens_per_frame, dit.glu_width) == (20, 880, 6720)
    assert dit.rope_pairs == (20, 18, 18) and dit.camera_rope_pairs == (10, 9, 9)
    assert dit.key_scale == pytest.approx(3.18529e-3, rel=1e-5)
    assert dit.main_scale == dit.camera_scale == pytest.approx(112**-0.5)
    assert [i for i in range(dit.depth) if dit.is_softmax(i)] == [3, 7, 11, 15, 19]
    assert (world.image_height, world.image_width) == (704, 1280) and world.vae.spatial_stride == 32
    assert (world.stream.chunk_frames, world.stream.cached_chunks, world.stream.sink, world.stream.fps) == (3, 2, True, 16)


def test_defaults_follow_the_official_code() -> None:
    dit = DiTConfig()
    assert not dit.rms_clamp and dit.camera_conv_tail and dit.condition_mask_dtype == dit.ray_dtype == "float32"
    assert dit.main_softmax_scale is None and dit.camera_softmax_scale is None


def test_tiny_has_every_mechanism() -> None:
    world = tiny_config()
    assert {world.dit.is_softmax(i) for i in range(world.dit.depth)} == {False, True}
    assert (world.image_height, world.image_width) == (192, 320)


@given(st.integers(1, 32).map(lambda n: 8 * n))
def test_rotary_pairs_fill_a_head(width: int) -> None:
    config = DiTConfig(hidden=width, head_dim=width, cross_heads=1)
    assert sum(config.rope_pairs) == width // 2 and sum(config.camera_rope_pairs) == width // 4
    assert config.rope_pairs[1] == config.rope_pairs[2] and config.camera_rope_pairs[1] == config.camera_rope_pairs[2]
    # The camera branch slices the main table.
    assert all(c <= m for c, m in zip(config.camera_rope_pairs, config.rope_pairs))


@pytest.mark.parametrize("change", [{"hidden": 2241}, {"head_dim": 100}, {"hidden": 36, "head_dim": 12, "cross_heads": 1}, {"cross_heads": 19}])
def test_widths_that_do_not_divide(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must be a multiple of .*correct the model configuration"):
        DiTConfig(**change)


def test_parts_must_match() -> None:
    with pytest.raises(UserError, match="the DiT takes 64 latent channels and the VAE makes 128"):
        WorldConfig(dit=DiTConfig(in_channels=64))
    with pytest.raises(UserError, match="captions of width 2304 and the text encoder makes 64"):
        WorldConfig(text=TextConfig(hidden=64))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    world = preset(name)
    assert WorldConfig.from_json(json.loads(json.dumps(world.to_json()))) == world


@given(
    st.builds(
        replace,
        st.just(DiTConfig()),
        rms_clamp=st.booleans(),
        camera_conv_tail=st.booleans(),
        ray_dtype=st.sampled_from(["float32", "bfloat16"]),
        condition_mask_dtype=st.sampled_from(["float32", "bfloat16"]),
        main_softmax_scale=st.none() | st.floats(0.01, 1),
        camera_softmax_scale=st.none() | st.floats(0.01, 1),
        height=st.integers(1, 50),
    )
)
def test_every_switch_survives_json(dit: DiTConfig) -> None:
    world = WorldConfig(dit=dit, stream=replace(StreamConfig(), sigmas=(1.0, 0.5, 0.0), timesteps=(1000, 500)))
    assert WorldConfig.from_json(json.loads(json.dumps(world.to_json()))) == world


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["dit"].update(colour=1), r"config\.dit: unknown fields colour; the file was written by another version"),
        (lambda d: d.update(dit=[1]), r"config\.dit: expected an object, found list"),
        (lambda d: d.update(future={}), "config: unknown fields future"),
        (lambda d: d["dit"].pop("rms_clamp"), r"config\.dit: fields rms_clamp are missing; the file was written by another version"),
        (lambda d: d.pop("stream"), "config: fields stream are missing"),
        (lambda d: d["vae"].update(latent_channels=3), "the DiT takes 128 latent channels and the VAE makes 3"),
    ],
)
def test_json_of_another_version(edit: Any, message: str) -> None:
    data = WorldConfig().to_json()
    edit(data)
    with pytest.raises(UserError, match=message):
        WorldConfig.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": (1000, 500)}, "one flow time more than timesteps, found 5 and 2"),
        ({"chunk_frames": 0}, "chunks of at least one frame"),
        ({"cached_chunks": 1}, "a window with the chunk before, found chunk_frames 3, cached_chunks 1, sink True"),
        ({"cached_chunks": 0, "sink": False}, "a window with the chunk before"),
    ],
)
def test_schedules_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamConfig(**change)
    assert StreamConfig(cached_chunks=1, sink=False).cached_chunks == 1 and StreamConfig(cached_chunks=-1).cached_chunks == -1


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="unknown preset 'huge'; choose one of tiny, full"):
        preset("huge")


def test_configurations_are_frozen() -> None:
    for config in (DiTConfig(), VAEConfig(), TextConfig(), StreamConfig(), WorldConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.name = "x"  # type: ignore[misc, union-attr]

"""Program signatures: shapes, dtypes, names, and that what one program leaves is what the next one takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import DiTConfig, WorldConfig, tiny_config
from sanawm.errors import UserError
from sanawm.programs import ATTENTION_FIELDS, CHUNK_KINDS, PARTS, Geometry, Program, TensorSpec, camera_program, past_specs, programs, state_specs

TINY = tiny_config()
FULL = Geometry(WorldConfig(), prompt_tokens=556, dtype="bfloat16")
GEOMETRIES = st.builds(
    Geometry,
    st.just(TINY) | st.builds(lambda carry: replace(TINY, dit=replace(TINY.dit, camera_conv_tail=carry)), st.booleans()),
    prompt_tokens=st.integers(512, 600),
    first_frames=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)

NAMES = """
text_encoder image_encoder decode_first decode prompt_kv camera_first denoise_first commit_first denoise_second commit_second camera denoise_steady
commit_steady
"""


def shapes(specs: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def renamed(specs: Any, old: str, new: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name.replace(f"{old}.", f"{new}.", 1): value for name, value in shapes(specs).items()}


def test_names() -> None:
    table = programs(FULL)
    assert list(table) == NAMES.split() and all(name == program.name for name, program in table.items())
    assert [p for part in PARTS for p in programs(FULL, (part,))] == list(table)
    assert [camera_program(kind) for kind in CHUNK_KINDS] == ["camera_first", "camera", "camera"]


def test_official_shapes() -> None:
    table = programs(FULL)
    steady = table["denoise_steady"]
    assert steady.input("latents").shape == steady.output("velocity").shape == (1, 128, 3, 22, 40)
    assert steady.input("timestep").shape == (1, 3) and steady.input("timestep").dtype == "float32"
    assert table["denoise_first"].input("latents").shape == (1, 128, 4, 22, 40)
    # Chunk 0 has 4 * 880 = 3520 tokens, later chunks 2640: with its own, a steady chunk attends to 8800.
    assert steady.input("sink.3.k").shape == (1, 3520, 20, 112) and steady.input("past.3.k").shape == (1, 2640, 20, 112)
    assert steady.input("past.0.s").shape == (1, 20, 112, 112) and steady.input("past.0.s").dtype == "float32"
    assert steady.input("past.0.k_tail").shape == (1, 3, 880, 2240) and steady.input("past.0.k_tail").dtype == "bfloat16"
    assert steady.input("keys.0").shape == (1, 300, 20, 112) and steady.input("plucker.19").shape == (1, 2640, 2240)
    assert table["text_encoder"].input("input_ids").shape == (1, 556) and table["text_encoder"].output("text").shape == (1, 300, 2304)
    assert table["decode"].output("frames").shape == (8, 704, 1280, 3) and table["decode_first"].output("frames").shape == (1, 704, 1280, 3)


def test_official_state_is_as_large_as_published() -> None:
    """Of a stream at 704x1280: keys and values of the sink and one chunk 552 MB, convolution tails 355 MB, scan states 30 MB, FFN tails 79 MB."""
    sizes: dict[str, int] = {}
    for spec in past_specs(FULL, "steady"):
        field = spec.name.rsplit(".", 1)[1]
        sizes[field] = sizes.get(field, 0) + spec.nbytes
    assert sum(sizes[f] for f in ATTENTION_FIELDS) == 5 * 4 * (3520 + 2640) * 2240 * 2 == 551_936_000
    assert sizes["k_tail"] + sizes["cam_tail"] == 2 * 15 * 3 * 880 * 2240 * 2 == 354_816_000
    assert round((sizes["s"] + sizes["s_cam"]) / 1e6) == 30
    assert sizes["ffn_tail"] == 20 * 880 * 2240 * 2 == 78_848_000


@given(GEOMETRIES)
def test_what_a_chunk_leaves_is_what_the_next_takes(geometry: Geometry) -> None:
    table = programs(geometry)
    first, second, steady = (shapes(past_specs(geometry, kind)) for kind in CHUNK_KINDS)
    assert not first
    assert second == renamed(table["commit_first"].outputs, "next", "past")
    assert {n: v for n, v in steady.items() if n.startswith("past.")} == renamed(table["commit_second"].outputs, "next", "past")
    assert shapes(table["commit_second"].outputs) == shapes(table["commit_steady"].outputs)
    sink = {n: v for n, v in steady.items() if n.startswith("sink.")}
    attention = [s for s in table["commit_first"].outputs if s.name.rsplit(".", 1)[1] in ATTENTION_FIELDS]
    assert sink == renamed(attention, "next", "sink") and len(sink) == 4 * sum(geometry.config.dit.is_softmax(i) for i in range(4))
    for kind in CHUNK_KINDS:
        inputs = shapes(table[f"denoise_{kind}"].inputs)
        # The clean pass takes what a denoising step takes, but for the timestep, which is zero.
        assert shapes(table[f"commit_{kind}"].inputs) == {n: v for n, v in inputs.items() if n != "timestep"}
        given_before = shapes(table["prompt_kv"].outputs) | shapes(table[camera_program(kind)].outputs)
        given_before |= shapes([table["text_encoder"].output("text_mask")])
        assert given_before.items() <= inputs.items()
        assert set(inputs) == set(given_before) | {"latents", "timestep"} | set(shapes(past_specs(geometry, kind)))
    assert renamed(table["decode_first"].outputs, "next", "past").items() >= shapes(table["decode"].inputs[1:]).items()
    assert shapes(table["decode"].outputs[1:]) == shapes(table["decode_first"].outputs[1:])
    assert table["image_encoder"].output("latents") == table["decode"].input("latents")


@given(GEOMETRIES)
def test_names_are_unique_and_sizes_positive(geometry: Geometry) -> None:
    for program in programs(geometry).values():
        for side in (program.inputs, program.outputs):
            assert len({spec.name for spec in side}) == len(side)
            assert all(spec.nbytes > 0 and spec.meaning for spec in side)


@settings(max_examples=12, deadline=None)
@given(GEOMETRIES)
def test_state_is_the_models(make_model: Any, make_clip: Any, geometry: Geometry) -> None:
    """The clean pass of the torch model leaves exactly the tensors that the signature lists."""
    from sanawm.model.sampler import camera_features

    config = replace(geometry.config.dit, hidden=16, head_dim=8, cross_heads=2, depth=2, softmax_every=2, height=2, width=2)
    geometry = replace(geometry, config=replace(geometry.config, dit=config))
    dtype = getattr(torch, geometry.dtype)
    frames = geometry.first_frames
    model, clip = make_model(config, 0, dtype), make_clip(config, frames, 0)
    camera = camera_features(model, clip.camera, clip.plucker, 0, frames)
    _, state = model(clip.latents, torch.zeros(1, frames), clip.features(model), camera, commit=True)
    left = {f"next.{i}.{name}": t for i, block in enumerate(state) for name, t in block.tensors().items()}
    found = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in left.items()}
    assert found == shapes(state_specs(geometry, "first", "next"))


def test_switching_the_camera_tail_off_removes_it() -> None:
    bare = Geometry(replace(TINY, dit=replace(TINY.dit, camera_conv_tail=False)), 40)
    fields = {spec.name.rsplit(".", 1)[1] for spec in state_specs(bare, "first", "next")}
    carried = {spec.name.rsplit(".", 1)[1] for spec in state_specs(Geometry(TINY, 40), "first", "next")}
    assert carried - fields == {"cam_tail"}


def test_lookup_by_name() -> None:
    program = Program("p", (TensorSpec("a", "float32", (2, 3)),), (TensorSpec("b", "bfloat16", (4,)),))
    assert program.input("a").nbytes == 24 and program.output("b").nbytes == 8
    with pytest.raises(StopIteration):
        program.input("b")


@pytest.mark.parametrize("change", [{"cached_chunks": 3}, {"cached_chunks": -1}, {"sink": False}])
def test_programs_have_one_window(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="compiled programs attend to the first and the previous chunk"):
        Geometry(replace(TINY, stream=replace(TINY.stream, **change)), 40)


def test_frames_of_each_kind() -> None:
    geometry = Geometry(WorldConfig(dit=DiTConfig()), 556, first_frames=5)
    assert [geometry.frames(kind) for kind in CHUNK_KINDS] == [5, 3, 3]

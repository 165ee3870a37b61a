"""Parity on recorded vectors: the shared recording, recordings made here in float64 and by diffusers, and files that cannot be used."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import SanaWMTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sanawm.config import DiTConfig, StreamConfig
from sanawm.errors import UserError
from sanawm.keys import to_diffusers
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import camera_features, stream
from sanawm_export import parity
from sanawm_export.parity import Row, read_recording, run_parity

GOLDEN = Path(__file__).parents[1] / "golden" / "dit_tiny.safetensors"
SMALL = DiTConfig(
    in_channels=6, hidden=48, depth=2, softmax_every=2, head_dim=16, cross_heads=3, caption_channels=10, text_tokens=5, height=2, width=3
)
CLAMPED = replace(SMALL, rms_clamp=True, main_softmax_scale=0.3, camera_softmax_scale=1 / math.sqrt(128), camera_conv_tail=False)
# float32 against values of up to four of another implementation or of float64.
TORCH_TOLERANCE = 5e-6
# ONNX Runtime's own kernels, through a whole sampler.
ONNX_TOLERANCE = 5e-5

Groups = dict[str, DiTConfig]


def passed(row: Row, tolerance: float) -> bool:
    """Within the tolerance, which is for values of about one to four; these weights have outliers, and their caches values up to a dozen."""
    return row.error <= tolerance * max(1.0, row.scale / 4)


def sampled(model: SanaWM, clip: Any, group: str) -> dict[str, Tensor]:
    """The outputs of the streaming sampler by their recorded names; caches in the layout of public code."""
    found: dict[str, Tensor] = {}
    steps = list(stream(model, clip.latents, clip.features(model), clip.camera, clip.plucker))
    for step in steps:
        prefix = f"{group}.c{step.chunk.index}"
        found |= {f"{prefix}.s{i}.velocity": v for i, v in enumerate(step.velocities)}
        for i, block in enumerate(step.state):
            t = block.tensors()
            S, C = t["ffn_tail"].shape[1:]
            slots = {9: t["ffn_tail"].mT.reshape(1, C, 1, S)}
            if "k" in t:
                # Head-major, as the official code caches them.
                slots |= {n: t[name].transpose(1, 2) for n, name in enumerate(("k", "v", "cam_k", "cam_v"))}
            else:
                tails = {3: "cam_tail", 4: "k_tail"}
                slots |= {0: t["s"], 1: t["z"][..., None], 2: t["s_cam"]}
                slots |= {n: t[name].transpose(1, 2).reshape(S, 3, C) for n, name in tails.items() if name in t}
            found |= {f"{prefix}.block{i}.slot{n}": x for n, x in slots.items()}
    found[f"{group}.latents"] = torch.cat([s.latents for s in steps], 2)
    found[f"{group}.segments"] = torch.tensor([0, *(s.chunk.end for s in steps)])
    return found


def dense(model: SanaWM, clip: Any) -> dict[str, Tensor]:
    frames = clip.latents.shape[2]
    timestep = torch.full((1, 1, frames), 889.0)
    timestep[..., 0] = 0
    camera = camera_features(model, clip.camera, clip.plucker, 0, frames)
    return {"dense.timestep": timestep, "dense.out": model(clip.latents, timestep[:, 0], clip.features(model), camera)[0]}


def save(path: Path, config: DiTConfig, model: SanaWM, clip: Any, outputs: dict[str, Tensor], groups: Groups, **meta: str) -> Path:
    tensors = {f"weights.{n}": t for n, t in model.state_dict().items()} | outputs
    tensors |= {f"in.{name}": getattr(clip, name) for name in ("latents", "text", "camera", "plucker")}
    tensors = {name: (t if t.dtype == torch.int64 else t.float()).contiguous() for name, t in tensors.items()}
    tensors["in.mask"] = clip.mask.to(torch.uint8)
    sizes = {"heads": config.heads, "head_dim": config.head_dim, "layers": config.depth, "softmax_every": config.softmax_every}
    sizes |= {"height": config.height, "width": config.width, "cross_heads": config.cross_heads}
    settings = {
        f"{group}.{name}": str(getattr(c, name)).lower()
        for group, c in groups.items()
        for name in ("rms_clamp", "main_softmax_scale", "camera_softmax_scale", "camera_conv_tail")
        if getattr(c, name) is not None
    }
    save_file(tensors, path, {name: str(n) for name, n in sizes.items()} | settings | meta)
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, make_model: Any, make_clip: Any) -> Callable[..., Path]:
    """record(frames, groups): a recording by the float64 model; "dense" is one evaluation, any other group the sampler."""

    @functools.cache
    def make(frames: int, names: tuple[str, ...] = ("dense", "official", "stream")) -> Path:
        groups = {name: CLAMPED if name == "stream" else SMALL for name in names}
        clip = make_clip(SMALL, frames, frames, torch.float64)
        outputs: dict[str, Tensor] = {}
        for name, config in groups.items():
            model = make_model(config, 3, torch.float64)
            outputs |= dense(model, clip) if name == "dense" else sampled(model, clip, name)
        return save(tmp_path_factory.mktemp("recorded") / "vectors.safetensors", SMALL, model, clip, outputs, groups)

    return make


def test_the_shared_recording() -> None:
    rows = list(run_parity(GOLDEN))
    recorded = read_recording(GOLDEN)
    outputs = [n for n in recorded.tensors if not n.startswith(("in.", "weights.")) and n != "dense.timestep"]
    assert [r.tensor for r in rows] == outputs and len(rows) == 40
    assert {r.tensor.split(".")[0] for r in rows} == {"dense", "stream", "official"}
    assert max(r.error for r in rows) <= TORCH_TOLERANCE
    assert all(r.scale == recorded.tensors[r.tensor].abs().max() for r in rows)


@pytest.mark.parametrize("frames", [6, 7, 8, 11])
def test_torch_on_recordings_in_float64(frames: int, record: Callable[..., Path]) -> None:
    rows = list(run_parity(record(frames)))
    chunks = frames // 3
    # Both groups' velocities, two slots tables, latents and segments; one dense output. Without the camera tail a slot is missing.
    assert len(rows) == 1 + 2 * (4 * chunks + 2) + chunks * (6 + 5) + chunks * (5 + 5)
    assert all(passed(r, TORCH_TOLERANCE) for r in rows)


@pytest.mark.parametrize("width", [32, 112])
def test_torch_on_recordings_by_diffusers(width: int, tmp_path: Path, make_model: Any, make_clip: Any) -> None:
    """Other head widths, heads, depth and grid than the shared recording; 112 is the width whose camera scale diffusers pads to 128."""
    scale = 1 / math.sqrt(128 if width == 112 else width)
    sizes: dict[str, Any] = {"hidden": 2 * width, "head_dim": width, "cross_heads": 4, "depth": 3, "softmax_every": 3, "height": 3, "width": 2}
    config = replace(SMALL, **sizes, rms_clamp=True, camera_softmax_scale=scale)
    model, clip = make_model(config, 4), make_clip(config, 5, 4)
    timestep = torch.full((1, 1, 5), 960.0)
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor), torch.no_grad():
        theirs: Any = SanaWMTransformer3DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            hidden_size=config.hidden,
            num_attention_heads=config.cross_heads,
            softmax_every_n=config.softmax_every,
            linear_head_dim=config.head_dim,
            caption_channels=config.caption_channels,
            chunk_plucker_post_attn_blocks=config.depth,
        )
        theirs.eval().load_state_dict({to_diffusers(n): t for n, t in model.state_dict().items()}, strict=True)
        camera: Any = {"camera_conditions": clip.camera, "chunk_plucker": clip.plucker}
        out = theirs(clip.latents, timestep, clip.text, encoder_attention_mask=clip.mask, **camera, return_dict=False)[0]
    outputs = {"dense.out": out, "dense.timestep": timestep}
    (row,) = run_parity(save(tmp_path / "vectors.safetensors", config, model, clip, outputs, {"dense": config}))
    assert row.tensor == "dense.out" and row.scale > 0.5 and row.error <= TORCH_TOLERANCE


@pytest.mark.parametrize(("frames", "groups"), [(3, ("dense", "official")), (8, ("stream",))], ids=["3", "5+3"])
def test_onnxruntime_on_recordings_in_float64(frames: int, groups: tuple[str, ...], record: Callable[..., Path]) -> None:
    """The remainders that the tiny bundle, whose first chunk has four frames, does not have; the shared recording takes minutes."""
    rows = list(run_parity(record(frames, groups), "onnxruntime"))
    assert {r.tensor.split(".")[0] for r in rows} == set(groups) and all(passed(r, ONNX_TOLERANCE) for r in rows)


def test_settings_of_each_group() -> None:
    recording = read_recording(GOLDEN)
    stream_config, official = recording.config("stream"), recording.config("official")
    assert stream_config.rms_clamp and not stream_config.camera_conv_tail and not official.rms_clamp and official.camera_conv_tail
    assert official.main_scale == official.camera_scale == pytest.approx(32**-0.5)
    assert (official.heads, official.head_dim, official.depth, official.height, official.width) == (2, 32, 4, 3, 4)
    assert recording.stream_config() == StreamConfig() and recording.groups == ["dense", "official", "stream"]


def rewrite(path: Path, tmp_path: Path, tensors: dict[str, Tensor | None] | None = None, **meta: str | None) -> Path:
    """A copy of a recording with tensors and metadata replaced, or removed where None."""
    recording = read_recording(path)
    changed = {n: t for n, t in (load_file(path) | (tensors or {})).items() if t is not None}
    said = {n: v for n, v in (recording.meta | meta).items() if v is not None}
    save_file(changed, tmp_path / "changed.safetensors", said)
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    ("tensor", "change"), [("dense.out", 1e-3), ("official.latents", float("nan")), ("stream.segments", 1), ("official.c1.block0.slot1", 1e-3)]
)
def test_a_wrong_value_is_found(tensor: str, change: float, tmp_path: Path, record: Callable[..., Path]) -> None:
    path = record(7)
    wrong = load_file(path)[tensor]
    wrong.view(-1)[-1] += change
    rows = {r.tensor: r for r in run_parity(rewrite(path, tmp_path, {tensor: wrong}))}
    assert rows.pop(tensor).error > 5e-4 and all(passed(r, TORCH_TOLERANCE) for r in rows.values())


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("stream", "rms_clamp", "false"),
        ("stream", "camera_conv_tail", "true"),
        ("stream", "main_softmax_scale", "0.25"),
        ("stream", "camera_softmax_scale", "0.25"),
        ("official", "rms_clamp", "true"),
    ],
)
def test_another_setting_is_another_result(group: str, name: str, value: str, tmp_path: Path, record: Callable[..., Path]) -> None:
    found = run_parity(rewrite(record(7), tmp_path, None, **{f"{group}.{name}": value}))
    assert max(r.error for r in found if r.tensor.startswith(group)) > 20 * TORCH_TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({"in.text": None}, {}, r"not a file of recorded vectors, it lacks in\.text"),
        ({}, {"heads": None}, "not a file of recorded vectors, it lacks heads"),
        ({"official.mystery": torch.zeros(1)}, {}, r"do not know how to compare the recorded tensor official\.mystery"),
        ({"official.latents": torch.zeros(1, 2)}, {}, r"official\.latents was recorded with shape \(1, 2\)"),
        ({}, {"head_dim": "24", "heads": "2"}, "the recorded weights do not fit the recorded metadata"),
        ({"weights.t_block.1.weight": None}, {}, "the recorded weights do not fit the recorded metadata"),
    ],
)
def test_recordings_that_cannot_be_used(
    tensors: dict[str, Tensor | None], meta: dict[str, Any], message: str, tmp_path: Path, record: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message):
        list(run_parity(rewrite(record(7), tmp_path, tensors, **meta)))


def test_a_file_without_weights(tmp_path: Path, record: Callable[..., Path]) -> None:
    path = record(7)
    none: dict[str, Tensor | None] = {n: None for n in load_file(path) if n.startswith("weights.")}
    with pytest.raises(UserError, match="it lacks weights"):
        list(run_parity(rewrite(path, tmp_path, none)))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_files_that_are_something_else(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="expected a safetensors file of recorded vectors"):
        list(run_parity(path))


def test_onnxruntime_refuses_another_window(tmp_path: Path, record: Callable[..., Path]) -> None:
    path = rewrite(record(6, ("official",)), tmp_path, sink="false")
    with pytest.raises(UserError, match="compare this file with --engine torch"):
        list(run_parity(path, "onnxruntime"))


def test_a_nan_of_ours_is_not_a_small_error(record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.TorchRunner, "dense", lambda self, timestep: torch.full((1, 6, 7, 2, 3), float("nan")))
    rows = {r.tensor: r for r in run_parity(record(7))}
    assert rows["dense.out"].error == math.inf

"""Self-rollouts with statistics: what is recorded, resuming, and the errors that name a layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sanawm.config import WorldConfig
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import stream
from sanawm_calibration import collect, store
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.evaluate import shared_copy
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.roles import model_layers, quantizable
from sanawm_calibration.store import Calibration

STEPS = ["1000", "960", "889", "727"]


def test_labels_counts_and_maxima_are_the_rollouts(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    seen: dict[str, float] = {}
    handle = model.get_submodule("blocks.1.attn.proj").register_forward_pre_hook(
        lambda module, args: seen.update(amax=max(seen.get("amax", 0.0), float(args[0].abs().amax())))
    )
    shard = collect.collect_clip(model, inputs[1], world.stream, rows=40)
    handle.remove()
    statistics = shard.sources["blocks.1.attention_out"]
    assert statistics.amax == seen["amax"]
    assert list(statistics.labels) == [*STEPS, "clean"]
    # 4 + 3 + 3 latent frames of 12 tokens, 128 channels.
    assert statistics.labels["960"].count == 10 * 12 * 128
    assert statistics.rows.shape == (40, 128)
    assert list(shard.sources["text"].labels) == ["prompt"] and list(shard.sources["plucker"].labels) == ["camera"]
    # 3 chunks of 4 denoising steps and a clean pass; the last block's clean pass ends before the temporal convolution.
    assert shard.calls["blocks.0.mlp.t_conv"] == 15 and shard.calls["blocks.1.mlp.t_conv"] == 12
    assert shard.calls["blocks.0.cross_attn.kv_linear"] == 1


def test_layers_of_a_source_read_the_same_tensor(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    layers = quantizable(model.config)
    seen: dict[str, int] = {}
    wrong: list[str] = []
    handles = []
    for name, layer in layers.items():

        def check(module: object, args: tuple[torch.Tensor, ...], source: str = layer.source, name: str = name) -> None:
            if seen.setdefault(source, id(args[0])) != id(args[0]):
                wrong.append(name)

        handles.append(model.get_submodule(name).register_forward_pre_hook(check))
    kept: list[object] = []
    handles.append(model.register_forward_pre_hook(lambda module, args: seen.clear()))
    # Inputs stay alive while a forward runs, so that an id is never reused.
    handles += [model.get_submodule(n).register_forward_pre_hook(lambda module, args: kept.append(args[0])) for n in layers]
    item = inputs[0]
    text = model.encode_text(item.text, item.text_mask)
    next(stream(model, item.noise(), text, item.camera, item.plucker, world.stream))
    for handle in handles:
        handle.remove()
    assert not wrong


def test_finished_clips_are_not_computed_again(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs], tmp_path: Path) -> None:
    identity = {"checkpoint": "a"}
    with pytest.raises(KeyboardInterrupt):

        def interrupt(name: str, done: int, total: int, chunk: int, chunks: int) -> None:
            if done == 1 and chunk == 2:
                raise KeyboardInterrupt

        collect.collect(model, inputs, world.stream, tmp_path, identity, rows=30, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["clip-1.safetensors"]
    computed: list[str] = []

    def note(name: str, done: int, total: int, chunk: int, chunks: int) -> None:
        if chunks > 1:
            computed.append(name)

    resumed = collect.collect(model, inputs, world.stream, tmp_path, identity, rows=30, progress=note)
    assert set(computed) == {"clip-4", "clip-6"}
    fresh = collect.collect(model, inputs, world.stream, tmp_path / "fresh", identity, rows=30)
    for a, b in zip(resumed, fresh):
        assert a.calls == b.calls
        for source in a.sources:
            mine, theirs = a.sources[source].tensors(), b.sources[source].tensors()
            assert all(torch.equal(mine[k], theirs[k]) for k in theirs), source
    # Another checkpoint, or a damaged file, is computed again.
    computed.clear()
    (tmp_path / "clip-6.safetensors").write_bytes(b"damaged")
    collect.collect(model, inputs[:1], world.stream, tmp_path, {"checkpoint": "b"}, rows=30, progress=note)
    assert set(computed) == {"clip-1"}
    assert collect.read_shard(tmp_path / "clip-6.safetensors", "x") is None


def test_a_set_that_never_reaches_the_steady_window(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs], tmp_path: Path) -> None:
    item = inputs[0]
    short = dataclasses.replace(
        item, clip=item.clip.limited(49), camera=item.camera[:, :7], plucker=item.plucker[:, :, :7]
    )
    with pytest.raises(CalibrationError, match=r"never reaches the steady window: its longest clip, clip-1, has 2 chunks \(49 frames\).*73 frames"):
        collect.collect(model, [short], world.stream, tmp_path, {}, rows=8)


def test_values_that_are_not_finite_name_the_layer(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    broken = shared_copy(model)
    weight = broken.blocks[1].attn.proj.weight.detach().clone()
    weight[3, 3] = float("nan")
    broken.blocks[1].attn.proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(CalibrationError, match=r"blocks\.1\.cross_attn\.q_linear: its input has an infinity or NaN at 1000 in clip clip-1"):
        collect.collect_clip(broken, inputs[0], world.stream, rows=8)
    # Products of the prompt are evaluated before the first step.
    text = inputs[0].text.clone()
    text[0, 3, 5] = torch.inf
    with pytest.raises(CalibrationError, match=r"blocks\.0\.cross_attn\.kv_linear: its input has an infinity or NaN at prompt in clip clip-1"):
        collect.collect_clip(model, dataclasses.replace(inputs[0], text=text), world.stream, rows=8)


def test_layers_that_were_not_exercised_are_named(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    shard = collect.collect_clip(model, inputs[0], world.stream, rows=8)
    shard.calls["blocks.1.mlp.t_conv"] = 0
    with pytest.raises(CalibrationError, match=r"blocks\.1\.mlp\.t_conv was never exercised"):
        store.build([shard], world, checkpoint={}, clips=[], settings={})
    shard.calls["blocks.1.mlp.t_conv"] = 1
    shard.sources["blocks.0.camera_out"].channel_amax.zero_()
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn\.out_proj_cam saw only zeros"):
        store.build([shard], world, checkpoint={}, clips=[], settings={})


def test_the_file_is_read_back_as_it_was(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    store.write(calibration, path)
    again = store.read(path)
    assert again.config == calibration.config and again.summary == calibration.summary and again.outliers == calibration.outliers
    assert all(torch.equal(again.tensors[s][k], t) for s, part in calibration.tensors.items() for k, t in part.items())
    assert set(again.summary) == {layer.source for layer in quantizable(calibration.config.dit).values()}
    assert {p.name for p in tmp_path.iterdir()} == {"calibration.json", "calibration.safetensors"}
    layers = model_layers(calibration.config.dit)
    assert again.channel_amax(layers["blocks.0.mlp.t_conv"]).shape == (384,)
    again.check_checkpoint("0")
    with pytest.raises(CalibrationError, match="of another checkpoint"):
        again.check_checkpoint("1")


def test_damaged_files_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(CalibrationError, match=r"end in \.json"):
        store.write(calibration, tmp_path / "calibration.txt")
    with pytest.raises(CalibrationError, match="not a readable calibration file"):
        store.read(path)
    store.write(calibration, path)
    vectors = tmp_path / "calibration.safetensors"
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1
    vectors.write_bytes(bytes(data))
    with pytest.raises(CalibrationError, match="missing or of another calibration"):
        store.read(path)
    text = json.loads(path.read_text())
    for change, message in (({"schema": 99}, "schema 99"), ({"config": {}}, "not a readable|missing"), ({"tensors": 3}, "not a readable")):
        path.write_text(json.dumps(text | change))
        with pytest.raises(Exception, match=message):
            store.read(path)
    path.write_text("{")
    with pytest.raises(CalibrationError, match="not a readable calibration file"):
        store.read(path)


def test_the_chunk_grid_of_inputs(inputs: list[ClipInputs]) -> None:
    noise = inputs[0].noise()
    assert noise.shape[2] == inputs[0].latent_frames == 10
    assert torch.equal(noise[:, :, :1], inputs[0].first_latent)
    assert not torch.equal(inputs[0].noise(1)[:, :, 1:], noise[:, :, 1:])

"""A recipe on the whole transformer: merging, fake quantization, evaluation, sensitivity, search, report."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sanawm.config import DiTConfig, WorldConfig
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import stream
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.cost import RATES, CostModel
from sanawm_calibration.errors import CalibrationError, RecipeError
from sanawm_calibration.evaluate import check_clipping, compare, encode_camera, record, shared_copy, turned
from sanawm_calibration.gates import EXPORT_SQNR, Gate, layer_gates
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.merge import merge_projections
from sanawm_calibration.page import render
from sanawm_calibration.quantize import FakeQuantLinear
from sanawm_calibration.recipe import LayerFormat, layer_table, load_recipe
from sanawm_calibration.report import CAVEAT, candidate, make_report, realised_bytes
from sanawm_calibration.roles import model_layers, quantizable
from sanawm_calibration.search import cosine_of_noise, frontier_point, greedy, limits, noise_of_cosine
from sanawm_calibration.sensitivity import CAMERA, Sensitivity, ladder, measure, noise, record_points
from sanawm_calibration.store import Calibration


def latents(model: SanaWM, item: ClipInputs, world: WorldConfig) -> list[torch.Tensor]:
    text = model.encode_text(item.text.to(model.dtype), item.text_mask)
    return [s.latents for s in stream(model, item.noise().to(model.dtype), text, item.camera, item.plucker, world.stream)]


def table_of(name: str, world: WorldConfig) -> dict[str, LayerFormat]:
    return layer_table(load_recipe(name), world.dit)


# --- merging ---


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4", "nvfp4-guarded"])
def test_merged_projections_compute_the_same(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs], recipe: str) -> None:
    merged = shared_copy(model)
    table, members = merge_projections(merged, table_of(recipe, world))
    # A GDN block's beta projection joins the group of its format; in softmax blocks nothing calls it.
    groups = {"bf16": [6, 5], "nvfp4": [2, 3, 2, 3], "nvfp4-guarded": [4, 4]}
    assert [len(inside) for inside in members.values()] == groups[recipe]
    for name, inside in members.items():
        linear = merged.get_submodule(name)
        assert isinstance(linear, nn.Linear) and linear.out_features % 64 == 0
        stacked = torch.cat([model.get_submodule(member).weight for member in inside])
        assert torch.equal(linear.weight[: len(stacked)], stacked) and not linear.weight[len(stacked) :].any()
        assert name in table and not set(inside) & set(table)
    found = latents(copy.deepcopy(merged).double(), inputs[2], world)
    expected = latents(copy.deepcopy(model).double(), inputs[2], world)
    # The same products in float64; a library may sum a larger product in another order.
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(found, expected))


def test_a_copy_of_a_merged_model_works_by_itself(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    merged = shared_copy(model)
    merge_projections(merged, table_of("bf16", world))
    copied = shared_copy(merged)
    assert torch.equal(latents(copied, inputs[0], world)[0], latents(merged, inputs[0], world)[0])


def test_a_merged_layer_refuses_another_input(world: WorldConfig, model: SanaWM) -> None:
    merged = shared_copy(model)
    merge_projections(merged, table_of("bf16", world))
    with pytest.raises(RuntimeError, match="another input"):
        merged.blocks[0].attn.qkv(torch.zeros(1, 2, 128))


# --- quantization of the model ---


def test_every_layer_gets_its_format(world: WorldConfig, model: SanaWM, calibration: Calibration) -> None:
    table = table_of("nvfp4-guarded", world)
    found = candidate(model, table, calibration)
    for name, layer_format in table.items():
        module = found.get_submodule(name)
        if layer_format.format == "bf16":
            assert type(module) is nn.Linear and module.weight is model.get_submodule(name).weight
        else:
            assert isinstance(module, FakeQuantLinear) and module.packed.layer_format == layer_format and module.packed.name == name
    # The reference keeps its layers.
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in table)


def test_realised_bytes_are_those_of_the_formats(world: WorldConfig, model: SanaWM, calibration: Calibration) -> None:
    found = candidate(model, table_of("nvfp4", world), calibration)
    sizes = realised_bytes(found)
    layers = model_layers(world.dit)
    formats = table_of("nvfp4", world)
    for kind in ("nvfp4", "fp8"):
        named = [n for n, f in formats.items() if f.format == kind]
        biases = sum(4 * b.numel() for n in named if (b := model.get_submodule(n).bias) is not None)
        exact = sum(formats[n].weight_bytes(layers[n]) for n in named) + 4 * len(named) + biases
        assert sizes[kind] == pytest.approx(exact, abs=1)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert realised_bytes(model) == {"nvfp4": 0, "fp8": 0, "bf16": whole}
    assert sum(sizes.values()) < whole / 2


def test_a_calibration_of_another_model_is_refused(world: WorldConfig, model: SanaWM, calibration: Calibration) -> None:
    table = table_of("fp8", world)
    other = replace(calibration, tensors={s: {k: t[..., :64] for k, t in p.items()} for s, p in calibration.tensors.items()})
    with pytest.raises(CalibrationError, match=r"blocks\.0\.plucker_proj has 128 inputs and the calibration knows 64"):
        quantize_model(shared_copy(model), table, other)
    none = replace(calibration, tensors={})
    with pytest.raises(CalibrationError, match=r"blocks\.0\.plucker_proj: the calibration file has no statistics"):
        quantize_model(shared_copy(model), table, none)
    empty = replace(calibration, tensors={s: p | {"rows": p["rows"][:0]} for s, p in calibration.tensors.items()})
    name = "blocks.0.attn.qkv"
    with pytest.raises(CalibrationError, match=rf"{name}: AWQ needs sampled inputs"):
        quantize_model(shared_copy(model), {name: LayerFormat("nvfp4", "mse", awq=True)}, empty)


def test_clipping_names_the_layer(world: WorldConfig, model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]) -> None:
    # Statistics a hundred times too small: every input leaves its range, the worst one is named.
    small = replace(calibration, tensors={s: p | {"channel_amax": p["channel_amax"] / 100} for s, p in calibration.tensors.items()})
    found = candidate(model, table_of("fp8", world), small)
    latents(found, inputs[0], world)
    with pytest.raises(CalibrationError, match=r"fp8: the input of blocks\.\d\.\S+ reached \S+ and its scale clips at"):
        check_clipping(found, "fp8")
    fine = candidate(model, table_of("fp8", world), calibration)
    latents(fine, inputs[0], world)
    check_clipping(fine, "fp8")
    with torch.no_grad():
        fine.get_submodule("blocks.1.attn.proj")(torch.full((1, 1, 128), float("nan")))
    with pytest.raises(CalibrationError, match=r"blocks\.1\.attn\.proj has an infinity or NaN"):
        check_clipping(fine, "fp8")


# --- evaluation ---


def test_a_reference_against_itself_loses_nothing(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    scores = compare(model, {"same": shared_copy(model)}, inputs[:1], world)["same"]
    assert list(scores.velocity_sqnr) == ["1000", "960", "889", "727"]
    assert all(value == math.inf for value in (*scores.velocity_sqnr.values(), *scores.free_sqnr))
    assert scores.chunk_cosine == pytest.approx([1, 1, 1]) and scores.camera_cosine == pytest.approx(1)


def test_recording_is_the_samplers_rollout(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    records = list(record(model, inputs[2], world.stream))
    expected = latents(model, inputs[2], world)
    assert [torch.equal(r.latents, x) for r, x in zip(records, expected)] == [True] * 3
    assert [len(r.past) for r in records] == [0, 1, 2] and all(len(r.calls) == 4 for r in records)


def test_the_turned_camera_moves_only_its_chunk(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs]) -> None:
    chunk = list(record(model, inputs[0], world.stream))[1].chunk
    camera, plucker = turned(inputs[0], world, chunk)
    moved = (camera != inputs[0].camera).flatten(2).any(-1)[0]
    assert moved.tolist() == [chunk.start <= i < chunk.end for i in range(10)]
    assert plucker.shape == inputs[0].plucker.shape
    own = encode_camera(model, inputs[0], chunk)
    other = encode_camera(model, inputs[0], chunk, (camera, plucker))
    assert not torch.equal(own.rays, other.rays) and torch.equal(own.cos, other.cos)


def test_recipes_rank_as_their_formats(world: WorldConfig, model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]) -> None:
    names = ("fp8", "nvfp4-guarded", "nvfp4", "nvfp4-official")
    scores = compare(model, {n: candidate(model, table_of(n, world), calibration) for n in names}, inputs[:1], world)
    worst = {name: min(scores[name].velocity_sqnr.values()) for name in names}
    assert worst["fp8"] > worst["nvfp4-guarded"] > worst["nvfp4"]
    assert worst["nvfp4-guarded"] > worst["nvfp4-official"]
    assert scores["fp8"].camera_cosine > scores["nvfp4-guarded"].camera_cosine > scores["nvfp4"].camera_cosine
    # Another seed is another video: its latents are as far from the first as two random draws.
    assert max(scores["other seed"].free_sqnr) < 3 < min(scores["nvfp4"].free_sqnr)


# --- search ---


def test_sensitivity_is_of_one_layer_and_leaves_the_model(
    world: WorldConfig, model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]
) -> None:
    points = record_points(model, inputs[:1], world)
    assert noise(model, points) == dict.fromkeys(["1000", "960", "889", "727", CAMERA], 0.0)
    found = measure(model, calibration, points, ladder(["nvfp4", "fp8"]))
    assert set(found.noise) == set(quantizable(world.dit)) and found.columns == ["1000", "960", "889", "727", CAMERA]
    assert noise(model, points) == dict.fromkeys(found.columns, 0.0)
    nvfp4, fp8 = ladder(["nvfp4", "fp8"])
    louder = [name for name in found.noise if found.noise[name][nvfp4]["960"] > found.noise[name][fp8]["960"]]
    assert len(louder) > 0.95 * len(found.noise)
    # Noise of single layers adds up to the whole's, roughly: what the greedy search relies on.
    whole = noise(candidate(model, dict.fromkeys(found.noise, nvfp4), calibration), points)
    for column in ("1000", "727"):
        assert 0.4 < whole[column] / sum(found.noise[name][nvfp4][column] for name in found.noise) < 2.5


def _synthetic(config: DiTConfig, loud: str) -> Sensitivity:
    """All layers alike but one, which is a hundred times as sensitive."""
    nvfp4, fp8, _ = ladder(["nvfp4", "fp8", "bf16"])
    noises, ratios = {}, {}
    for name in quantizable(config):
        level = 0.05 if name == loud else 0.0005
        noises[name] = {nvfp4: {"1000": level, CAMERA: level}, fp8: {"1000": level / 16, CAMERA: level / 16}}
        ratios[name] = {nvfp4: 18.0, fp8: 28.0}
    return Sensitivity(noises, ratios)


def test_greedy_promotes_what_matters_first(world: WorldConfig) -> None:
    loud = "blocks.0.attn.proj"
    sensitivity = _synthetic(world.dit, loud)
    steps = ladder(["nvfp4", "fp8", "bf16"])
    calls = []

    def measured(table: dict[str, LayerFormat]) -> dict[str, float]:
        calls.append(table)
        parts = [sensitivity.noise[n][f] for n, f in table.items() if n in sensitivity.noise and f.format != "bf16"]
        # The truth is louder than the sum, so the first prediction fails and is corrected.
        return {c: 2.5 * sum(p[c] for p in parts) for c in ("1000", CAMERA)}

    fp8 = {"1000": 0.005, CAMERA: 0.01}
    cost = CostModel(world, "rtx5090")
    result = greedy(sensitivity, steps, cost, fp8, measured)
    assert result.table[loud].format == "fp8" or result.table[loud].format == "bf16"
    assert result.frontier[1].promoted.startswith(loud)
    assert all(result.measured[c] <= result.limits[c] for c in result.limits)
    promoted = [n for n, f in result.table.items() if n in sensitivity.noise and f.format != "nvfp4"]
    assert len(promoted) < len(sensitivity.noise) / 2
    assert len(calls) >= 2
    sizes = [p.nbytes for p in result.frontier]
    assert sizes == sorted(sizes) and result.frontier[-1].velocity_sqnr == math.inf
    json.dumps({k: v for k, v in result.to_json().items() if k != "frontier"}, allow_nan=False)
    with pytest.raises(CalibrationError, match="no mix of formats passes"):
        greedy(sensitivity, steps, cost, fp8, lambda table: {"1000": 1.0, CAMERA: 1.0})


def test_layers_under_their_own_gate_start_higher(world: WorldConfig) -> None:
    sensitivity = _synthetic(world.dit, "")
    name = "blocks.1.attn.qkv"
    sensitivity.layer_sqnr[name] = {f: (10.0 if f.format == "nvfp4" else 20.0) for f in sensitivity.layer_sqnr[name]}
    steps = ladder(["nvfp4", "fp8", "bf16"])
    quiet = {"1000": 0.001, CAMERA: 0.001}
    result = greedy(sensitivity, steps, CostModel(world, "rtx5090"), quiet, lambda table: quiet)
    assert result.table[name].format == "bf16" and result.table["blocks.1.attn.proj"].format == "nvfp4"


def test_costs(world: WorldConfig) -> None:
    full = WorldConfig()
    layers = model_layers(full.dit)
    cost = CostModel(full, "rtx5090")
    ffn = layers["blocks.0.mlp.inverted_conv.conv"]
    # 2640 x 13440 x 2240 in bfloat16 at 209.5 TFLOP/s, five times a chunk.
    assert cost.seconds(ffn, LayerFormat()) == pytest.approx(5 * 2 * 2640 * 13440 * 2240 / 209.5e12)
    assert cost.seconds(ffn, LayerFormat("nvfp4")) < cost.seconds(ffn, LayerFormat("fp8")) < cost.seconds(ffn, LayerFormat())
    assert cost.seconds(ffn, LayerFormat("nvfp4", lowrank=32)) > cost.seconds(ffn, LayerFormat("nvfp4"))
    assert cost.seconds(layers["blocks.0.cross_attn.kv_linear"], LayerFormat()) == 0
    assert cost.total(layer_table(load_recipe("nvfp4"), full.dit))[0] <= 2.1e9
    assert not CostModel(full, "h200").supports("nvfp4") and "h200" in RATES
    with pytest.raises(RecipeError, match="h200 has no nvfp4 units"):
        CostModel(full, "h200").seconds(ffn, LayerFormat("nvfp4"))
    with pytest.raises(RecipeError, match="no rates are known for the target 'tpu'"):
        CostModel(full, "tpu")
    assert cosine_of_noise(noise_of_cosine(0.8)) == pytest.approx(0.8)
    assert limits(["1000", CAMERA], {CAMERA: 0.0})[CAMERA] == pytest.approx(1 / 0.81 - 1)
    assert frontier_point(cost, layer_table(load_recipe("bf16"), full.dit), {"1": 0.0, CAMERA: 0.0}, True).velocity_sqnr == math.inf


# --- report ---


def test_the_default_recipe_passes_the_gates_and_the_report_says_so(
    model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]
) -> None:
    report = make_report(model, calibration, inputs[1:2], "nvfp4-guarded")
    assert report.passed, report.failed
    names = [gate.name for gate in report.gates]
    assert sum(name.startswith("layer ") for name in names) == len(report.layers) == 28
    assert {"velocity SQNR at 960 (dB)", "latent cosine of chunk 2", "camera-delta cosine"} <= set(names)
    assert set(report.free) == {"nvfp4-guarded", "fp8", "other seed"} and set(report.velocity) == {"nvfp4-guarded", "fp8"}
    assert all(0 < row.range_used <= 1 for row in report.layers)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] and data["caveat"] == CAVEAT and data["total_bytes"] == sum(data["nbytes"].values())
    assert data["gates"][0].keys() >= {"name", "value", "limit", "passed"}
    page = render(report)
    assert page.count("data:image/png;base64,") == 7 and "passes every gate" in page and "cannot be known" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_plain_4_bit_recipe_does_not_pass_and_the_report_names_what_fails(
    model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]
) -> None:
    report = make_report(model, calibration, inputs[1:2], "nvfp4-official")
    assert not report.passed
    assert any(gate.name.startswith(("velocity", "camera")) for gate in report.failed)
    assert "fails" in render(report)


def test_gates_compare_with_limits() -> None:
    assert Gate("a", 2.0, 2.0).passed and not Gate("a", 1.99, 2.0).passed and not Gate("a", math.nan, 2.0).passed
    gates = layer_gates({"x": ("nvfp4", 15.9), "y": ("fp8", 26.0)})
    assert [gate.passed for gate in gates] == [False, True] and EXPORT_SQNR == 30


def test_fake_quantization_in_bfloat16(world: WorldConfig, model: SanaWM, calibration: Calibration, inputs: list[ClipInputs]) -> None:
    """The same scales serve a bfloat16 model: powers of two do not change when they are rounded."""
    half = copy.deepcopy(model).bfloat16()
    found = shared_copy(half)
    fake_quantized(found, quantize_model(found, table_of("nvfp4-guarded", world), calibration))
    item = replace(inputs[0], text=inputs[0].text.bfloat16(), first_latent=inputs[0].first_latent.bfloat16())
    scores = compare(half, {"x": found}, [item], world)["x"]
    assert min(scores.velocity_sqnr.values()) > 15

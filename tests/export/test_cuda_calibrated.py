"""Calibrated CUDA bundles: packed weights against the quantized layers, and plans against the fake-quantized torch model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from small_world import made_up_calibration, small

from sanawm.errors import UserError
from sanawm.model.linearize import linearize
from sanawm.programs import Geometry, programs
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.quantize import quantize_linear
from sanawm_calibration.recipe import LayerFormat, layer_table, load_recipe
from sanawm_calibration.roles import quantizable
from sanawm_export.check import decibels, step_inputs
from sanawm_export.cuda import arena, reference
from sanawm_export.cuda.calibrated import calibrated_scale, packed_weights
from sanawm_export.cuda.lower import dit_weights, lower_part_dit
from sanawm_export.cuda.recipes import recipe_formats
from sanawm_export.onnx.export import program_module
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor
from sanawm_runtime.engines._cuda_plan import Launch

# Block 0 has every format, with two products of NVFP4 that differ in their scales alone; block 1 the guarded recipe's split. One block's Plücker
# product takes the embedded maps, and the other one's the maps.
RECIPE = """
description = "Every format and every way to choose scales."
[[layers]]
tiers = ["A", "B"]
format = "fp8"
[[layers]]
roles = ["qkv", "ffn_in", "ffn_out", "cross_proj"]
format = "nvfp4"
scales = "mse"
[[layers]]
roles = ["output_gate", "ffn_time"]
blocks = "0"
format = "nvfp4"
scales = "four-over-six"
[[layers]]
roles = ["proj"]
blocks = "0"
format = "nvfp4"
[[layers]]
roles = ["cross_q", "cross_kv"]
blocks = "0"
format = "bf16"
[[layers]]
roles = ["plucker"]
blocks = "1"
format = "bf16"
"""
WORLD = small()
# A pose at the origin and the intrinsics of a small picture.
CAMERA = torch.cat((torch.eye(4).reshape(-1), torch.tensor([8.0, 8.0, 5.0, 3.0])))


class Lab:
    """The small model quantized by a recipe, as the fake-quantized torch model and as plans with packed weights."""

    def __init__(self, make_model: Callable[..., Any], recipe: Path, dtype: torch.dtype) -> None:
        self.calibration = made_up_calibration(WORLD, {"fingerprint": "", "source": ""})
        self.plain, self.model = (make_model(WORLD.dit, dtype=dtype) for _ in range(2))
        asked = layer_table(load_recipe(recipe), WORLD.dit)
        self.found = recipe_formats(WORLD.dit, asked, calibrated_scale(self.calibration))
        self.quantized = quantize_model(self.model, self.found.table, self.calibration, merge=True)
        fake_quantized(self.model, self.quantized)
        self.geometry = Geometry(WORLD, 16, 4, str(dtype).removeprefix("torch."))
        self.weights = dit_weights(self.geometry, self.found.formats)
        self.lowered = lower_part_dit(self.geometry, self.weights, 120)
        self.bytes = packed_weights(self.quantized, self.found, WORLD.dit)
        source = {name: t.float().numpy() for name, t in make_model(WORLD.dit, dtype=dtype).state_dict().items()}
        self.packed = {}
        for name, p in self.weights.tensors.items():
            data = self.bytes[name] if p.op == "calibrated" else p.make(lambda n, shape: source[n].reshape(shape)).reshape(-1).view(np.uint8)
            self.packed[name] = torch.from_numpy(data.copy()).view(getattr(torch, p.dtype)).reshape(p.shape)

    def expected(self, model: Any, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        program = programs(self.geometry)[name]
        with torch.no_grad():
            outputs = program_module(program, model)(*(inputs[t.name] for t in program.inputs))
            return {spec.name: self.carried(model, spec.name, value) for spec, value in zip(program.outputs, outputs, strict=True)}

    def carried(self, model: Any, name: str, value: torch.Tensor) -> torch.Tensor:
        """What plans hold for the FFN's last frame: the next frame's product with it. Other tensors are as they are."""
        if not name.endswith(".ffn_tail"):
            return value
        layer = model.get_submodule(f"blocks.{name.split('.')[1]}.mlp.t_conv")
        rows = value.reshape(-1, WORLD.dit.hidden)
        return layer(torch.cat((rows, torch.zeros_like(rows), torch.zeros_like(rows)), 1)).reshape(value.shape)

    def executed(self, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arena.check(self.lowered[name].plan)
        with torch.no_grad():
            chosen = {spec.name: self.carried(self.model, spec.name, inputs[spec.name]) for spec in programs(self.geometry)[name].inputs}
        return reference.run(self.lowered[name], chosen, self.packed)

    def inputs(self, name: str) -> dict[str, torch.Tensor]:
        """Random inputs of a program with a camera at the origin; of the first chunk those that a build's check makes."""
        if name == "denoise_first":
            return step_inputs(self.plain, self.geometry)
        generator = torch.Generator().manual_seed(4)
        specs = programs(self.geometry)[name].inputs
        found = {s.name: torch.randn(s.shape, generator=generator).to(getattr(torch, s.dtype)) for s in specs}
        fixed = {"rays": torch.eye(4), "rays_inverse": torch.eye(4), "timestep": torch.tensor(889.0), "camera_conditions": CAMERA}
        return found | {key: value.expand(found[key].shape).contiguous() for key, value in fixed.items() if key in found}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "everything.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def exact(make_model: Callable[..., Any], recipe: Path) -> Lab:
    return Lab(make_model, recipe, torch.float32)


@pytest.mark.parametrize("name", ["prompt_kv", "camera_first", "denoise_first", "denoise_steady", "commit_steady"])
def test_float32_plans_equal_the_fake_quantized_model(exact: Lab, name: str) -> None:
    inputs = exact.inputs(name)
    expected, found, unquantized = exact.expected(exact.model, name, inputs), exact.executed(name, inputs), exact.expected(exact.plain, name, inputs)
    changed = 0
    for key, want in expected.items():
        agreement = decibels(want.numpy(), found[key].reshape(want.shape).numpy())
        changed += decibels(unquantized[key].numpy(), want.numpy()) < 60
        # Sums in another order; hardly any activation is close enough to a boundary of its format for that to matter.
        assert agreement >= 100, key
    # It is the quantized model that the plans agree with, not merely the model.
    assert changed > 0


def test_bfloat16_plans_agree_as_far_as_roundings_do(make_model: Callable[..., Any], recipe: Path) -> None:
    half = Lab(make_model, recipe, torch.bfloat16)
    inputs = half.inputs("denoise_first")
    found = half.executed("denoise_first", inputs)["velocity"].float().numpy()
    expected, unquantized = (half.expected(m, "denoise_first", inputs)["velocity"].float().numpy() for m in (half.model, half.plain))
    # Both sides round every product to bfloat16, here and there differently, and then an activation falls on another of the sixteen numbers of
    # NVFP4: as far as TensorRT's graphs and the model agree in bfloat16.
    assert decibels(expected, found) >= 18
    assert decibels(unquantized, found) < decibels(expected, found) - 1


def test_packed_weights_are_those_of_the_calibration(exact: Lab, make_model: Callable[..., Any]) -> None:
    """Each product's codes and scales stand for the very numbers of the layer that sanawm_calibration makes of the stacked weights."""
    state = linearize(make_model(WORLD.dit)).state_dict()
    layers, seen = quantizable(WORLD.dit), set()
    for name, members in exact.found.layers.items():
        weight = torch.cat([state[f"{member}.weight"] for member in members])
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        entry = exact.found.table[members[0]]
        want = quantize_linear(name, linear, entry, exact.calibration.channel_amax(layers[members[0]]))
        get = {part.removeprefix(f"{name}."): tensor for part, tensor in exact.packed.items()}
        if entry.format == "nvfp4":
            got: Any = Nvfp4Tensor(get["codes"], get["blocks"], get["global"].reshape(()))
        else:
            got = Fp8Tensor(get["codes"], get["scales"].reshape(()))
        rows = got.dequantize(torch.float64)
        assert torch.equal(rows[: len(weight)], want.weight.dequantize(torch.float64)), name
        assert not rows[len(weight) :].any()
        assert get["input_scale"].item() == want.input_scale
        seen.add(entry.label)
    assert seen == {"fp8", "nvfp4/rtn", "nvfp4/mse", "nvfp4/four-over-six"}


def test_products_are_split_by_format(exact: Lab) -> None:
    formats = exact.found.formats
    cameras = ("q_proj_cam", "k_proj_cam", "v_proj_cam")
    gates = ("beta_proj", "gate_proj")
    assert formats.merged(0) == {
        "blocks.0.merged.0": ("qkv",), "blocks.0.merged.1": cameras, "blocks.0.merged.2": ("output_gate",), "blocks.0.gates": gates,
    }  # fmt: skip
    assert formats.merged(1) == {"blocks.1.merged.0": ("qkv",), "blocks.1.merged.1": (*cameras, "output_gate"), "blocks.1.gates": gates}
    # Queries and gate are NVFP4 with one activation scale: their rows are quantized once, by the modulation.
    labels = [step.label for step in exact.lowered["denoise_first"].plan.steps if isinstance(step, Launch)]
    assert [n for n in labels if n.startswith("blocks.0.merged") and n.endswith("quantize")] == ["blocks.0.merged.1.quantize"]
    assert exact.found.widened == ()


def test_plucker_products_take_the_maps_where_the_recipe_leaves_them_in_bfloat16(exact: Lab) -> None:
    assert [exact.packed[f"blocks.{i}.plucker.{part}"].shape[1] for i, part in enumerate(("codes", "weight"))] == [64, 48]
    labels = [step.label for step in exact.lowered["camera"].plan.steps if step.label.startswith("plucker")]
    assert labels == ["plucker.tokens", "plucker", "plucker.0.quantize", "plucker.0", "plucker.1"]


def test_what_the_kernels_cannot_split_is_widened_and_said() -> None:
    table = layer_table(load_recipe("nvfp4"), WORLD.dit)
    table["blocks.1.attn.k_proj_cam"] = LayerFormat("nvfp4", "mse")
    found = recipe_formats(WORLD.dit, table, lambda layer, entry: 1.0)
    assert [(w.layer, w.asked, w.given) for w in found.widened] == [("blocks.1.attn.k_proj_cam", "nvfp4/mse", "fp8")]
    assert "one product" in found.widened[0].reason
    assert found.table["blocks.1.attn.k_proj_cam"].format == "fp8"
    assert found.formats.of("blocks.1.merged.1").kind == "fp8"


@pytest.mark.parametrize("entry", [LayerFormat("nvfp4", awq=True), LayerFormat("nvfp4", lowrank=8)], ids=["awq", "lowrank"])
def test_what_the_kernels_do_not_compute_is_refused(entry: LayerFormat) -> None:
    table = layer_table(load_recipe("nvfp4"), WORLD.dit) | {"blocks.0.mlp.point_conv.conv": entry}
    with pytest.raises(UserError, match="no kernels for awq and lowrank"):
        recipe_formats(WORLD.dit, table, lambda layer, entry: 1.0)


def test_a_scale_of_another_calibration_is_found(exact: Lab) -> None:
    other = recipe_formats(WORLD.dit, exact.found.table, lambda layer, entry: 2.0**-20)
    with pytest.raises(ValueError, match="activation scale"):
        packed_weights(exact.quantized, other, WORLD.dit)

"""Roles and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sanawm.config import DiTConfig, tiny_config
from sanawm.model.dit import SanaWM
from sanawm_calibration.errors import CalibrationError, RecipeError
from sanawm_calibration.recipe import DEFAULT_RECIPE, LayerFormat, Recipe, counts, layer_table, load_recipe, recipe_names
from sanawm_calibration.roles import ROLES, model_layers, quantizable, role_of
from sanawm_calibration.scales import fp8_scale, limit, nvfp4_scale

FULL = DiTConfig()


def gigabytes(name: str) -> float:
    layers = model_layers(FULL)
    return sum(f.weight_bytes(layers[n]) for n, f in layer_table(load_recipe(name), FULL).items()) / 1e9


def test_every_product_of_the_model_has_one_role(model: SanaWM) -> None:
    from torch import nn

    layers = model_layers(model.config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(layers) == set(linears)
    for name, layer in layers.items():
        assert (layer.rows, layer.columns) == (linears[name].out_features, linears[name].in_features), name
    import re

    assert all(sum(bool(re.fullmatch(role.pattern, name)) for role in ROLES) == 1 for name in layers)


def test_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"no role is known for the layer blocks\.0\.attn\.new_proj"):
        role_of("blocks.0.attn.new_proj")


def test_tiers_of_the_full_model() -> None:
    share = {tier: sum(layer.weights for layer in model_layers(FULL).values() if layer.tier == tier) / 2_661_800_448 for tier in "ABC"}
    assert share["A"] == pytest.approx(0.60, abs=0.01)
    assert share["B"] == pytest.approx(0.38, abs=0.01)
    assert len(quantizable(FULL)) == 14 * 20


def test_shipped_recipes() -> None:
    assert recipe_names() == ["bf16", "fp8", "mixed", "nvfp4", "nvfp4-guarded", "nvfp4-official"]
    assert DEFAULT_RECIPE in recipe_names()
    assert gigabytes("nvfp4") <= 2.1
    assert gigabytes("bf16") == pytest.approx(5.315, abs=0.001)
    assert gigabytes("fp8") == pytest.approx(2.706, abs=0.001)
    table = layer_table(load_recipe("nvfp4-official"), FULL)
    # The published code's set is 68 % of the weights and leaves the camera path, the temporal convolution and the embedders alone.
    share = sum(model_layers(FULL)[n].weights for n, f in table.items() if f.format == "nvfp4") / 2_661_800_448
    assert share == pytest.approx(0.68, abs=0.005)
    assert counts(table)["bf16"] == 169
    assert all(load_recipe(name).description for name in recipe_names())


def test_later_rules_override_and_blocks_select(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[[layers]]\ntiers = ["A"]\nformat = "nvfp4"\nscales = "mse"\nawq = true\nlowrank = 8\n'
        '[[layers]]\nroles = ["ffn_in"]\nblocks = "0-1"\nformat = "fp8"\n'
        '[[layers]]\nroles = ["ffn_in"]\nblocks = "1"\nformat = "bf16"\n'
    )
    table = layer_table(load_recipe(file), tiny_config().dit)
    name = "blocks.{}.mlp.inverted_conv.conv"
    assert [table[name.format(i)].format for i in range(4)] == ["fp8", "bf16", "nvfp4", "nvfp4"]
    assert table["blocks.0.attn.qkv"] == LayerFormat("nvfp4", "mse", True, 8)
    assert table["blocks.0.attn.qkv"].label == "nvfp4/mse+awq+r8"
    assert table["blocks.0.mlp.t_conv"].format == "bf16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[layers]]\ntiers = ['A']\n", "no format is given"),
        ("[[layers]]\ntiers = ['A']\nformat = 'int4'\n", "unknown format 'int4'"),
        ("[[layers]]\ntiers = ['A']\nformat = 'nvfp4'\nscales = 'best'\n", "unknown scales 'best'"),
        ("[[layers]]\nroles = ['qvk']\nformat = 'fp8'\n", "unknown roles qvk"),
        ("[[layers]]\ntiers = ['A']\nroles = ['qkv']\nformat = 'fp8'\n", "either roles or tiers"),
        ("[[layers]]\ntiers = ['C']\nformat = 'fp8'\n", "cannot be quantized"),
        ("[[layers]]\ntiers = ['A']\nformat = 'fp8'\nawq = true\n", "belong to nvfp4"),
        ("[[layers]]\ntiers = ['A']\nformat = 'nvfp4'\nlowrank = -1\n", "rank from 0 up"),
        ("[[layers]]\ntiers = ['A']\nformat = 'nvfp4'\nblocks = '9-3'\n", "expected blocks"),
        ("[[layers]]\ntiers = ['A']\nformat = 'nvfp4'\nscale = 'mse'\n", "unknown settings scale"),
        ("layer = 3\n", "unknown settings layer"),
        ("from_search = true\n[[layers]]\ntiers = ['A']\nformat = 'fp8'\n", "found both"),
        ("layers = [1]\n", "rule 1: expected a"),
        ("not toml", "not valid TOML"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_recipes_that_do_not_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'nvfp5'"):
        load_recipe("nvfp5")
    file = tmp_path / "far.toml"
    file.write_text("[[layers]]\ntiers = ['A']\nblocks = '20-30'\nformat = 'fp8'\n")
    with pytest.raises(RecipeError, match="rule 1: no layer of this model matches; the blocks are 0 to 3"):
        layer_table(load_recipe(file), tiny_config().dit)
    file.write_text("[[layers]]\ntiers = ['A']\nformat = 'nvfp4'\nlowrank = 500\n")
    with pytest.raises(RecipeError, match=r"blocks\.0\..* too small for a correction of rank 500"):
        layer_table(load_recipe(file), tiny_config().dit)
    odd = DiTConfig(hidden=72, head_dim=24, cross_heads=3, depth=1)
    with pytest.raises(RecipeError, match=r"rows of 72 weights and NVFP4 needs a multiple of 16"):
        layer_table(load_recipe("nvfp4"), odd)


def test_mixed_needs_a_search_of_this_model() -> None:
    mixed = load_recipe("mixed")
    config = tiny_config().dit
    with pytest.raises(RecipeError, match="calibrate --search"):
        layer_table(mixed, config)
    found = dict.fromkeys(model_layers(config), LayerFormat("fp8"))
    assert layer_table(mixed, config, found) == found
    with pytest.raises(RecipeError, match="run on another model"):
        layer_table(mixed, FULL, found)
    assert layer_table(Recipe("none", ""), config) == dict.fromkeys(model_layers(config), LayerFormat())


@pytest.mark.parametrize("amax", [1e-6, 0.3, 1.0, 3.5, 448.0, 5e4])
def test_scales_are_powers_of_two_with_headroom(amax: float) -> None:
    for scale, nvfp4, headroom in ((fp8_scale(amax, "x"), False, 4), (nvfp4_scale(amax, "x"), True, 8)):
        mantissa, _ = __import__("math").frexp(scale)
        assert mantissa == 0.5
        assert headroom * amax <= limit(scale, nvfp4) < 2.0001 * headroom * amax


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan")])
def test_a_scale_needs_a_positive_maximum(amax: float) -> None:
    with pytest.raises(CalibrationError, match="blocks.3.layer: the calibrated maximum is"):
        fp8_scale(amax, "blocks.3.layer")

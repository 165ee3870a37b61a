"""Number formats of the CUDA engine: packing in numpy against the torch definitions, and quantized plans against the bfloat16 one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import WorldConfig, tiny_config
from sanawm.errors import UserError
from sanawm.keys import dit_tensors
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.programs import Geometry, programs
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_export.cuda import arena, reference
from sanawm_export.cuda.formats import PRECISIONS, Formats, formats_for
from sanawm_export.cuda.lower import dit_weights, lower_part_dit
from sanawm_export.cuda.recipes import planned_formats, recipe_formats
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor, quantize_fp8, quantize_nvfp4
from sanawm_runtime.engines._cuda_pack import Packed, Source, from_e4m3, to_e4m3
from sanawm_runtime.engines._cuda_plan import Launch

SEED = 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=64))
def test_e4m3_rounds_as_torch(values: list[float]) -> None:
    x = np.array(values, np.float32)
    want = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(to_e4m3(x), want.view(torch.uint8).numpy())


def test_every_e4m3_code_survives() -> None:
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    np.testing.assert_array_equal(to_e4m3(from_e4m3(codes)), codes)
    # Half-way between neighbours: to the even code.
    values = from_e4m3(np.arange(126, dtype=np.uint8)).astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(to_e4m3(middle) % 2, 0)


def rows(outliers: bool) -> np.ndarray:
    x = np.random.default_rng(4).standard_normal((48, 64)).astype(np.float32)
    if outliers:
        x[:, 5] *= 40
        x[7] = 0
    return x


@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_weights_are_packed_as_the_kernels_define(outliers: bool) -> None:
    x = rows(outliers)
    want = quantize_fp8(torch.from_numpy(x), per_row=True)
    assert isinstance(want, Fp8Tensor)
    source = (Source("w", x.shape),)
    codes = Packed("w", "float8_e4m3fn", x.shape, "rows", source, (), "fp8_codes", "float32").make(lambda *_: x)
    scales = Packed("w", "float32", (48,), "rows", source, (), "fp8_scales", "float32").make(lambda *_: x)
    np.testing.assert_array_equal(scales, want.scale.numpy())
    np.testing.assert_array_equal(codes, want.values.view(torch.uint8).numpy())


@pytest.mark.parametrize("outliers", [False, True])
def test_nvfp4_weights_are_packed_as_the_kernels_define(outliers: bool) -> None:
    x = rows(outliers)
    want = quantize_nvfp4(torch.from_numpy(x))
    assert isinstance(want, Nvfp4Tensor)
    source = (Source("w", x.shape),)
    made = {}
    for encoding, dtype, shape in (("nvfp4_codes", "uint8", (48, 32)), ("nvfp4_scales", "float8_e4m3fn", (48, 4)), ("nvfp4_global", "float32", (1,))):
        made[encoding] = Packed("w", dtype, shape, "rows", source, (), encoding, "float32").make(lambda *_: x)  # type: ignore[arg-type]
    np.testing.assert_array_equal(made["nvfp4_global"][0], want.global_scale.numpy())
    np.testing.assert_array_equal(made["nvfp4_scales"], want.scales.view(torch.uint8).numpy())
    got = Nvfp4Tensor(torch.from_numpy(made["nvfp4_codes"]), want.scales, want.global_scale).dequantize()
    torch.testing.assert_close(got, want.dequantize(), rtol=0, atol=0)


def test_merged_rows_are_stacked_and_padded_with_zeros() -> None:
    parts = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 3), np.float32)}
    packed = Packed("m", "float32", (5, 3), "rows", (Source("a", (2, 3)), Source("", (1, 3)), Source("b", (1, 3))), rounding="float32")
    np.testing.assert_array_equal(packed.make(lambda name, _: parts[name]), [[0, 1, 2], [3, 4, 5], [0, 0, 0], [1, 1, 1], [0, 0, 0]])


def test_two_linear_layers_are_packed_as_one() -> None:
    """Of the weights that bfloat16 can hold; the biases of both are in it."""
    random = np.random.default_rng(5)
    shapes = {"last.weight": (24, 32), "last.bias": (24,), "first.weight": (32, 6, 1, 1), "first.bias": (32,)}
    parts = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    sources = tuple(Source(name, shape) for name, shape in shapes.items())
    weight, bias = (
        torch.from_numpy(Packed("w", "float32", shape, "composed", sources).make(lambda name, _: parts[name])) for shape in ((24, 6), (24,))
    )
    last, last_bias, first, first_bias = (torch.from_numpy(part).bfloat16().double() for part in parts.values())
    x = torch.from_numpy(random.standard_normal((10, 6)))
    want = F.linear(F.linear(x, first.reshape(32, 6), first_bias), last, last_bias)
    torch.testing.assert_close(F.linear(x, weight.double(), bias.double()), want, rtol=1e-6, atol=1e-5)


def velocity(formats: Formats, target: int) -> torch.Tensor:
    """Velocity of a tiny first chunk by the plan in these formats."""
    world = tiny_config()
    geometry = Geometry(world, 64, 4, "bfloat16")
    weights = dit_weights(geometry, formats)
    lowered = lower_part_dit(geometry, weights, target)["denoise_first"]
    arena.check(lowered.plan)
    source = {name: synth_tensor(name, info.shape, SEED) for name, info in dit_tensors(world.dit).items()}
    packed = {n: torch.from_numpy(p.make(lambda name, _: source[name])).view(getattr(torch, p.dtype)) for n, p in weights.tensors.items()}
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for spec in programs(geometry, ("dit",))["denoise_first"].inputs:
        inputs[spec.name] = torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype))
    inputs["rays"] = inputs["rays_inverse"] = torch.eye(4).expand(inputs["rays"].shape).contiguous()
    inputs["timestep"] = torch.tensor([[0.0, 889, 889, 889]])
    return reference.run(lowered, inputs, packed)["velocity"].double()


def test_quantized_plans_stay_near_the_bfloat16_plan() -> None:
    """What the formats can hold, through four blocks: e4m3 has 3 mantissa bits (2.6 % a product), e2m1 one (10 %)."""
    want = velocity(Formats(), 120)
    distance = {}
    for precision in ("fp8", "mixed", "nvfp4"):
        got = velocity(formats_for(tiny_config().dit, precision), 120)
        distance[precision] = float((got - want).norm() / want.norm())
    assert 0 < distance["fp8"] < 0.1
    assert distance["fp8"] < distance["nvfp4"] < 0.45
    assert distance["mixed"] < 0.45


def calibrated(recipe: str) -> Formats:
    """Formats of the tiny model by a recipe, with scales of 1."""
    config = tiny_config().dit
    return recipe_formats(config, layer_table(load_recipe(recipe), config), lambda layer, entry: 1.0).formats


def quantizing(formats: Formats, target: int) -> dict[int, set[str]]:
    """Launches that only quantize rows, of a GDN block (0) and a softmax block (3)."""
    geometry = Geometry(tiny_config(), 64, 4, "bfloat16")
    plan = lower_part_dit(geometry, dit_weights(geometry, formats), target)["denoise_steady"].plan
    labels = [step.label for step in plan.steps if isinstance(step, Launch) and step.label.endswith(".quantize")]
    return {i: {label.removeprefix(f"blocks.{i}.") for label in labels if label.startswith(f"blocks.{i}.")} for i in (0, 3)}


def test_kernels_quantize_for_the_next_product_where_they_can() -> None:
    """With one scale the producing kernels quantize; row by row the products' inputs need launches of their own."""
    # The gated delta network hands its rows on unquantized.
    assert quantizing(calibrated("fp8"), 90) == {0: {"out_cam.quantize"}, 3: set()}
    # Two formats read the modulated rows: modulation writes one.
    guarded = quantizing(calibrated("nvfp4-guarded"), 120)
    assert guarded == {0: {"merged.1.quantize", "out_cam.quantize"}, 3: {"merged.1.quantize"}}
    by_row = {"out_cam.quantize", "proj.quantize", "cross.q.quantize", "cross.proj.quantize", "point.quantize"}
    assert quantizing(formats_for(tiny_config().dit, "fp8"), 90) == {0: by_row, 3: by_row}
    for kinds in quantizing(formats_for(tiny_config().dit, "nvfp4"), 120).values():
        assert kinds == {"out_cam.quantize"}


@pytest.mark.parametrize(("precision", "depth", "launches"), [*((precision, 48, 26) for precision in PRECISIONS), ("nvfp4-guarded", 2240, 28)])
def test_plucker_products_take_the_maps_where_they_are_not_quantized(precision: str, depth: int, launches: int) -> None:
    """Else they take an embedding of the maps, which is made and quantized once."""
    world = WorldConfig()
    geometry = Geometry(world, 512, 4, "bfloat16")
    weights = dit_weights(geometry, planned_formats(world.dit, precision, None))
    plan = lower_part_dit(geometry, weights, 120)["camera"].plan
    assert len(plan.steps) == launches
    assert [step.flops for step in plan.steps if step.label.startswith("plucker.") and step.flops] == [2 * 2640 * 2240 * depth] * 20
    assert any(step.label == "plucker" for step in plan.steps) == ("plucker_embedder.weight" in weights.tensors) == (depth == 2240)


@pytest.mark.parametrize("precision", [*PRECISIONS, "nvfp4-guarded", "nvfp4-official"])
def test_no_block_takes_more_than_25_launches(precision: str) -> None:
    world = WorldConfig()
    geometry = Geometry(world, 512, 4, "bfloat16")
    lowered = lower_part_dit(geometry, dit_weights(geometry, planned_formats(world.dit, precision, None)), 120)
    for name in ("denoise_first", "denoise_steady", "commit_steady"):
        counts = Counter(step.label.split(".")[1] for step in lowered[name].plan.steps if step.label.startswith("blocks."))
        assert len(counts) == 20 and max(counts.values()) <= 25


def test_the_camera_stays_out_of_nvfp4() -> None:
    for precision in ("mixed", "nvfp4"):
        formats = formats_for(WorldConfig().dit, precision)
        for i in range(20):
            assert formats.of(f"blocks.{i}.merged").kind == "fp8"
            assert formats.of(f"blocks.{i}.out_cam").kind == "fp8"
            assert formats.of(f"blocks.{i}.plucker").kind == "plain"
    assert formats_for(WorldConfig().dit, "mixed").of("blocks.5.inverted").kind == "fp8"
    assert formats_for(WorldConfig().dit, "mixed").of("blocks.6.inverted").kind == "nvfp4"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="unknown recipe 'int4'; choose one of bf16, fp8"):
        formats_for(tiny_config().dit, "int4")
    with pytest.raises(UserError, match="needs calibrated scales"):
        formats_for(tiny_config().dit, "nvfp4-guarded")

"""Synthetic activation families: the ranking of methods that published and earlier measurements found, with fixed seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sanawm_calibration.families import FAMILIES, camera_delta, random_weight
from sanawm_calibration.metrics import cosine, sqnr
from sanawm_calibration.quantize import FakeQuantLinear, quantize_linear
from sanawm_calibration.recipe import LayerFormat

M, K, N = 192, 768, 256
METHODS = {
    "fp8": LayerFormat("fp8"),
    "rtn": LayerFormat("nvfp4"),
    "mse": LayerFormat("nvfp4", "mse"),
    "four-over-six": LayerFormat("nvfp4", "four-over-six"),
    "awq": LayerFormat("nvfp4", "rtn", awq=True),
    "awq+mse": LayerFormat("nvfp4", "mse", awq=True),
    "awq+r32": LayerFormat("nvfp4", "rtn", awq=True, lowrank=32),
}


def layer(weight: Tensor, x: Tensor, layer_format: LayerFormat) -> FakeQuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return FakeQuantLinear(quantize_linear("layer", linear, layer_format, x.abs().amax(0), x), torch.float32)


@pytest.fixture(scope="module", params=[11, 12])
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """family -> method -> output SQNR in dB."""
    weight = random_weight(N, K, request.param)
    found = {}
    for family, draw in FAMILIES.items():
        x = draw(M, K, request.param + 100)
        found[family] = {name: sqnr(x @ weight.T, layer(weight, x, f)(x)) for name, f in METHODS.items()}
    return found


def test_formats_reach_their_level_on_every_family(results: dict[str, dict[str, float]]) -> None:
    assert len(results) == 5
    for family, by in results.items():
        # Per-tensor FP8 was measured at 28.3 to 28.8 dB, plain W4A4 at 17.5 to 19.1, on layers of these distributions.
        assert 28.0 < by["fp8"] < 29.0, family
        assert 17.0 < by["rtn"] < 19.2, family


def test_searched_scales_beat_plain_rounding_everywhere(results: dict[str, dict[str, float]]) -> None:
    for family, by in results.items():
        assert by["mse"] > by["rtn"] + 0.3, family
        assert by["four-over-six"] > by["rtn"] + 0.1, family
        assert by["mse"] > by["four-over-six"], family


def test_channel_scaling_helps_channel_outliers_and_little_else(results: dict[str, dict[str, float]]) -> None:
    assert results["channel outliers"]["awq"] > results["channel outliers"]["rtn"] + 2
    assert results["channel outliers"]["awq+mse"] > results["channel outliers"]["awq"]
    for family in ("gaussian", "gated", "correlated"):
        assert abs(results[family]["awq"] - results[family]["rtn"]) < 0.6, family


def test_low_rank_correction_adds_to_channel_scaling(results: dict[str, dict[str, float]]) -> None:
    for family, by in results.items():
        assert by["awq+r32"] > by["awq"], family
        assert by["fp8"] > max(by[m] for m in METHODS if m != "fp8") + 2, family


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_camera_delta_probe(seed: int) -> None:
    """A change of conditioning of 3 % of the activations' rms drowns in 4-bit activations; FP8 keeps most of it."""
    weight = random_weight(N, K, seed)
    before, after = camera_delta(M, K, seed)
    change = (after - before) @ weight.T

    def kept(name: str) -> float:
        quantized = layer(weight, before, METHODS[name])
        return cosine(change, quantized(after) - quantized(before))

    fp8, rtn, mse, svd = kept("fp8"), kept("rtn"), kept("mse"), kept("awq+r32")
    weights_alone = layer(weight, before, METHODS["rtn"]).weight
    # The loss is in the activations: 4-bit weights alone keep the change, and better ones do not help. FP8 keeps twice what W4A4 keeps; an
    # earlier measurement on its own draw had 0.995, 0.46 and 0.86.
    assert cosine(change, (after - before) @ weights_alone.T) > 0.985
    assert mse == pytest.approx(rtn, abs=0.02)
    assert 0.65 < fp8 < 0.9
    assert 0.4 * fp8 < rtn < 0.6 * fp8
    assert rtn + 0.03 < svd < 0.75 * fp8


def test_headroom_is_free_and_clipping_is_not() -> None:
    from sanawm_kernels.quant.formats import quantize_fp8, quantize_nvfp4

    for family, draw in FAMILIES.items():
        x = draw(M, K, 5)
        amax = float(x.abs().max())

        def fp4(share: float, x: Tensor = x, amax: float = amax) -> float:
            return sqnr(x, quantize_nvfp4(x, torch.tensor(share * amax / 2688)).dequantize())

        def fp8(share: float, x: Tensor = x, amax: float = amax) -> float:
            return sqnr(x, quantize_fp8(x, torch.tensor(share * amax / 448)).dequantize())

        assert fp4(16) > fp4(1) - 0.1 and fp4(0.5) < fp4(1) - 0.5, family
        assert fp8(8) > fp8(1) - 0.3 and fp8(0.5) < fp8(1) - 5, family

"""The check of emulated NVFP4 products: that it agrees with correct kernels, finds wrong ones, and launches cubins as they were compiled."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import cuda_fake
import kernels_nvfp4

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.gemm import plans
from sanawm_kernels.gemm.plans import Finish, Operand
from sanawm_kernels.gemm.table import default_config
from sanawm_kernels.quant.interpreter import exact
from sanawm_kernels.tokenwise.launch import launch
from sanawm_runtime.engines._cuda_device import Gpu

FP4, CONFIG = Operand("nvfp4"), default_config(0, "nvfp4", 64)
ROWS = 42
RESIDUAL = Finish(bias=True, frame_gate="bf16", residual=True, extra=True, quant="nvfp4")
VARIANTS = {
    "residual": plans.gemm(FP4, FP4, 48, 96, 14, RESIDUAL, CONFIG),
    "codes alone": plans.gemm(FP4, FP4, 48, 96, 14, Finish(bias=True, add=True, gate=True, quant="nvfp4", keep=False), CONFIG),
    "squares": plans.gemm(FP4, FP4, 48, 96, 14, Finish(bias=True, squares=True), CONFIG),
    "temporal": plans.temporal_conv(FP4, FP4, 48, 48, 14, ROWS, True, Finish(add=True, frame_gate="bf16", residual=True), CONFIG),
    "temporal, first": plans.temporal_conv(FP4, FP4, 48, 48, 14, ROWS, False, Finish(add=True, frame_gate="bf16", residual=True), CONFIG),
}


def found(variant: KernelVariant, run: Any) -> dict[str, float]:
    return kernels_nvfp4.errors(variant, ROWS, torch.Generator().manual_seed(2), "cpu", run)


@pytest.mark.parametrize("name", VARIANTS)
def test_correct_kernels_pass(name: str) -> None:
    variant = VARIANTS[name]
    with exact():
        errors = found(variant, launch)
    assert set(errors) == {n for n in ("out", "squares", "codes") if n in variant.signature}
    # Products of codes are exact in float32, so sums differ by its rounding alone, and a rounding to bfloat16 tips over now and then.
    assert all(value < 1e-3 for value in errors.values()), errors


def test_wrong_numbers_are_found() -> None:
    def swapped(variant: KernelVariant, given: Mapping[str, Any]) -> None:
        launch(variant, {**given, "a_scale": given["a_scale"] * 1.1})

    with exact():
        assert found(VARIANTS["temporal"], swapped)["out"] > 0.02
    # A kernel that writes nothing leaves NaN, which no bound holds for.
    assert all(math.isnan(value) for value in found(VARIANTS["squares"], lambda variant, given: None).values())


class AnyAddress(cuda_fake.FakeDriver):
    """Tensors of torch are not allocated through the driver."""

    def room(self, address: int) -> int:
        return 1


def test_a_cubin_gets_the_arguments_of_its_index(tmp_path: Path) -> None:
    variant = VARIANTS["residual"]
    image = b"cubin"
    entry = cuda_fake.index_entry(variant, "sm_90") | {"sha256": hashlib.sha256(image).hexdigest()}
    (tmp_path / entry["file"]).write_bytes(image)
    (tmp_path / "index.json").write_text(json.dumps({"kernels": [entry]}))
    driver = AnyAddress({image: entry}, {variant.name: ("out", "codes", "scales")})
    device = Gpu(driver=driver)
    cubins = kernels_nvfp4.Cubins(tmp_path, device)
    given = kernels_nvfp4.operands(variant, ROWS, torch.Generator().manual_seed(2), "cpu")
    cubins.launch(variant, given, device.new_stream())
    (launched,) = driver.launches
    assert variant.name in cubins and launched.grid == variant.launch_grid({"M": ROWS})
    assert launched.values == {n: v.data_ptr() if isinstance(v, torch.Tensor) else v for n, v in given.items()}

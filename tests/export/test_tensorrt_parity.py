"""The very graphs that engines are built from, in ONNX Runtime against the fake-quantized torch model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_world import RECIPE, made_up_calibration, small

from sanawm.programs import Geometry, programs
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_export.check import decibels, evaluate, step_inputs
from sanawm_export.onnx.export import program_module
from sanawm_export.quantized.export import export_prepared, prepare_export
from sanawm_export.tensorrt.kernels import KernelCompiler
from sanawm_export.tensorrt.lower import Lowering
from sanawm_runtime.engines._trt_library import open_library


@pytest.mark.parametrize(
    ("precision", "dtype", "least_db"),
    [
        # In bfloat16 both sides round every product, here and there differently, and then an activation falls on another of the few numbers of
        # its format; how far that spreads depends on the format's steps.
        ("fp8", torch.bfloat16, 30.0),
        ("everything", torch.bfloat16, 18.0),
        # In float32 hardly any activation is close enough to a boundary.
        ("everything", torch.float32, 100.0),
    ],
    ids=["fp8", "all formats", "all formats, float32"],
)
def test_built_graphs_agree_with_the_fake_quantized_model(
    tmp_path: Path, make_model: Callable[..., Any], precision: str, dtype: torch.dtype, least_db: float
) -> None:
    world, name = small(), "denoise_first"
    (tmp_path / "everything.toml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "everything.toml" if precision == "everything" else precision)
    calibration = made_up_calibration(world, {"fingerprint": "", "source": ""})
    geometry = Geometry(world, 16, 4, str(dtype).removeprefix("torch."))
    program = programs(geometry)[name]
    plain, reference, model = (make_model(world.dit, dtype=dtype) for _ in range(3))
    inputs = step_inputs(plain, geometry)
    fake_quantized(reference, quantize_model(reference, layer_table(recipe, world.dit), calibration, merge=True))
    with torch.no_grad():
        unquantized, expected = (program_module(program, m)(*(inputs[t.name] for t in program.inputs))[0].float().numpy() for m in (plain, reference))

    quantized = prepare_export(model, calibration, recipe, merge=True)
    (exported,) = export_prepared(model, quantized, geometry, tmp_path, names=[name])
    asked = {layer: entry.format for layer, entry in quantized.table.items() if entry.format != "bf16"}
    with KernelCompiler("sm_120") as compiler:
        lowering = Lowering(open_library("tensorrt_rtx"), "sm_120", "matmul", compiler)
        job, _, _ = lowering.job(program, tmp_path / exported.file, tmp_path, asked)
    assert {"fp8"} <= set(job.asked.values()) <= {"fp8", "nvfp4", "bf16", "fp32"}
    found = evaluate(job.graph, inputs)
    agreement, change = decibels(expected, found), decibels(unquantized, found)
    print(f"{precision} {dtype}: {agreement:.1f} dB with the fake-quantized model, {change:.1f} dB with the unquantized one")
    assert agreement >= least_db
    # It is the quantized model that the graph agrees with, not merely the model.
    assert change < agreement - 3

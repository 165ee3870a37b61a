"""CUDA bundles and printed plans with `--calibration`: what they say and hold, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import cuda_fake
from small_world import made_up_calibration, make, small

from sanawm.config import tiny_config
from sanawm.errors import BundleError, UserError
from sanawm.model.checkpoint import open_checkpoint
from sanawm_calibration.apply import quantize_model
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_calibration.store import read, write
from sanawm_export.build import BuildRequest
from sanawm_export.cli import build_engine
from sanawm_export.cuda import build
from sanawm_export.cuda.calibrated import calibrated_recipe
from sanawm_export.cuda.cli import plan
from sanawm_export.cuda.recipes import planned_formats
from sanawm_export.cuda.synthetic import SyntheticCheckpoint
from sanawm_export.parts import load_part
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines._cuda_weights import WeightTable, contents, read_table
from sanawm_runtime.engines.cuda import CudaEngine
from sanawm_runtime.summary import bundle_summary
from sanawm_runtime.targets import resolve_target


def fake_compile(variants: Mapping[str, KernelVariant], target: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """An index entry and bytes for each variant, without a compiler."""
    for name, variant in variants.items():
        assert target in variant.targets, f"{name} is not meant for sm_{target}"
        yield cuda_fake.index_entry(variant, f"sm_{target}"), name.encode()


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiled", fake_compile)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Checkpoint, calibration file, recipe file."""
    return make(tmp_path_factory.mktemp("small"))


def request(checkpoint: Any, precision: str | Path, calibration: Path | None, target: str = "rtx5090") -> BuildRequest:
    return BuildRequest(checkpoint, resolve_target(target), "cuda", str(precision), calibration=calibration)


def test_a_bundle_holds_the_quantized_layers_and_says_where_they_come_from(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, calibration, recipe = open_checkpoint(files[0]), *files[1:]
    bundle = build.build_cuda(request(checkpoint, recipe, calibration), tmp_path / "bundle")
    summary = bundle.manifest.precision.summary
    assert set(summary["layers"]) == {"nvfp4/rtn", "fp8", "bf16"} and summary["widened"] == []
    assert {"fp8", "nvfp4"} == set(summary["products"])
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration["recipe"] == "everything" and bundle.manifest.calibration["clips"] == 1
    assert bundle_summary(bundle)["precision"]["summary"] == summary
    assert not any("not calibrated" in sentence for sentence in bundle.manifest.unverified)

    model = load_part(checkpoint, "dit", torch.bfloat16)
    quantized = quantize_model(model, layer_table(load_recipe(recipe), checkpoint.world.dit), read(calibration), merge=True)  # type: ignore[arg-type]
    stored = {packed.name: data for packed, data in contents(read_table(bundle.read("weights/dit.json"), "dit"), bundle)}
    point = quantized.packed["blocks.1.mlp.point_conv.conv"].weight
    np.testing.assert_array_equal(stored["blocks.1.point.codes"], point.packed.reshape(-1).numpy())  # type: ignore[union-attr]
    np.testing.assert_array_equal(stored["blocks.1.point.blocks"], point.scales.view(torch.uint8).reshape(-1).numpy())  # type: ignore[union-attr]
    temporal = quantized.packed["blocks.0.mlp.t_conv"]
    np.testing.assert_array_equal(stored["blocks.0.temporal.codes"], temporal.weight.values.view(torch.uint8).reshape(-1).numpy())  # type: ignore[union-attr]
    assert stored["blocks.0.temporal.input_scale"].view(np.float32)[0] == temporal.input_scale


@pytest.mark.parametrize("precision", ["nvfp4-guarded", "nvfp4-official", "fp8"])
def test_every_program_of_a_calibrated_build_can_be_enqueued(files: tuple[Path, Path, Path], precision: str, tmp_path: Path) -> None:
    """Alignment, sizes, grids and parameters, as the driver would see them."""
    bundle = build.build_cuda(request(open_checkpoint(files[0]), precision, files[1]), tmp_path / "bundle")
    entries = {e["name"].encode(): e for e in json.loads(bundle.read("kernels/index.json"))["kernels"]}
    launches = [step for e in bundle.manifest.programs.values() for step in Plan.from_json(bundle.read(e.file)).steps if isinstance(step, Launch)]
    assert any(step.label.endswith(".gates") for step in launches)
    writes: dict[str, Any] = {step.kernel: step.writes for step in launches}
    driver = cuda_fake.FakeDriver(entries, writes, capability=120)
    engine = CudaEngine(bundle, Gpu(driver=driver))
    for name in ("prompt_kv", "camera", "denoise_first", "denoise_steady", "commit_steady"):
        program = bundle.manifest.programs[name]
        specs = [build.TensorSpec(t.name, t.dtype, t.shape) for t in (*program.inputs, *program.outputs)]
        buffers = {spec.name: engine.allocate(spec) for spec in specs}
        engine.run(name, buffers)
        buffers.clear()
    assert driver.launches
    engine.close()


def test_a_plain_recipe_quantizes_nothing(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain = build.build_cuda(request(open_checkpoint(files[0]), "bf16", None, "rtx3090"), tmp_path / "plain")
    given = build.build_cuda(request(open_checkpoint(files[0]), "bf16", files[1], "rtx3090"), tmp_path / "given")
    assert plain.read("weights/dit.json") == given.read("weights/dit.json")
    assert plain.manifest.calibration is None and given.manifest.calibration is not None


@pytest.mark.parametrize(
    ("precision", "calibrated", "target", "message"),
    [
        ("nvfp4-guarded", False, "rtx5090", "run `sanawm calibrate`"),
        ("nvfp4-guarded", True, "h200", "NVFP4 kernels for sm_120"),
        ("fp8", True, "rtx3090", "no FP8 tensor cores"),
        ("mixed", True, "rtx5090", "sanawm calibrate --search"),
        ("int4", True, "rtx5090", "unknown recipe 'int4'; choose one of bf16, fp8"),
        ("int4", False, "rtx5090", "unknown recipe 'int4'; choose one of bf16, fp8"),
    ],
)
def test_what_cannot_be_built_is_refused(
    files: tuple[Path, Path, Path], precision: str, calibrated: bool, target: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build.build_cuda(request(open_checkpoint(files[0]), precision, files[1] if calibrated else None, target), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_calibration_of_another_model_is_refused(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(files[0])
    write(made_up_calibration(checkpoint.world, {"fingerprint": "0", "source": "elsewhere"}), tmp_path / "other.json")
    with pytest.raises(UserError, match=r"another checkpoint \(elsewhere\)"):
        build.build_cuda(request(checkpoint, "fp8", tmp_path / "other.json"), tmp_path / "bundle")
    with pytest.raises(UserError, match="another size"):
        calibrated_recipe("fp8", files[1], tiny_config().dit)


def test_weights_from_a_seed_cannot_be_calibrated(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sanawm checkpoint synth"):
        build.build_cuda_synthetic(request(SyntheticCheckpoint(small(), 1), "fp8", files[1]), tmp_path / "bundle", 1)
    bundle = build.build_cuda(request(open_checkpoint(files[0]), "fp8", files[1]), tmp_path / "stored")
    tensors = read_table(bundle.read("weights/dit.json"), "dit").tensors
    with pytest.raises(BundleError, match="found a seed"):
        WeightTable(tensors, seed=1)
    with pytest.raises(ValueError, match="when the bundle was built"):
        next(p for p in tensors if p.op == "calibrated").make(lambda name, shape: np.zeros(shape, np.float32))


def test_the_command_builds_a_recipe(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options = ["--checkpoint", str(files[0]), "--precision", str(files[2]), "--calibration", str(files[1])]
    cuda = [*options, "--engine", "cuda", "--target", "rtx5090", "-o", str(tmp_path / "bundle"), "--json"]
    result = CliRunner().invoke(build_engine, cuda, catch_exceptions=False)
    assert json.loads(result.stdout)["precision"]["summary"]["products"]["nvfp4"] > 0
    with pytest.raises(UserError, match="reads no --calibration"):
        CliRunner().invoke(build_engine, [*options, "--target", "cpu", "-o", str(tmp_path / "cpu")], catch_exceptions=False)


def test_plans_are_printed_for_recipes(files: tuple[Path, Path, Path]) -> None:
    common = ["--config", "tiny", "--target", "rtx5090", "--json"]
    labels = {}
    for precision in ("nvfp4", "nvfp4-guarded"):
        result = CliRunner().invoke(plan, [*common, "--precision", precision], catch_exceptions=False)
        labels[precision] = {row["name"] for row in json.loads(result.stdout)["operations"]}
    assert {"merged.0", "merged.1"} <= labels["nvfp4-guarded"] and "merged" in labels["nvfp4"]
    with pytest.raises(UserError, match="unknown recipe 'int4'"):
        CliRunner().invoke(plan, [*common, "--precision", "int4"], catch_exceptions=False)
    # Without a calibration file nvfp4 is the engine's own, with it the recipe.
    world = small()
    assert planned_formats(world.dit, "nvfp4", None).of("blocks.0.merged").quant == "fp8_rows"
    assert planned_formats(world.dit, "nvfp4", files[1]).of("blocks.0.merged.0").recipe == "nvfp4/mse"

"""A whole bundle for the RTX 5090: NVFP4, FP8 and bfloat16 layers, recurrent blocks as plugins; its audit, its cache, its interruption."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import small_world

from sanawm.errors import UserError
from sanawm.model.checkpoint import open_checkpoint
from sanawm.programs import programs
from sanawm_calibration.recipe import layer_table, load_recipe
from sanawm_export.build import BuildRequest
from sanawm_export.tensorrt import build as build_module
from sanawm_export.tensorrt.build import TensorRTOptions, build_tensorrt, build_tensorrt_targets
from sanawm_export.tensorrt.graphs import GraphSource
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._trt_library import Library
from sanawm_runtime.summary import bundle_summary, render_bundle
from sanawm_runtime.targets import resolve_target


@dataclass(frozen=True)
class Made:
    """A finished build and where everything lies."""

    checkpoint: Path
    calibration: Path
    recipe: Path
    cache: Path
    bundle: Bundle
    seconds: float

    def again(self, out: Path, **options: Any) -> Bundle:
        arguments = {"cache": self.cache, "precision": str(self.recipe)} | options
        return small_world.build(self.checkpoint, self.calibration, out=out, **arguments)

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.bundle.read("build-report.json"))
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("small")
    patch = pytest.MonkeyPatch()
    patch.setattr(build_module, "sources_digest", lambda: "frozen")
    checkpoint, calibration, recipe = small_world.make(folder)
    started = time.monotonic()
    bundle = small_world.build(checkpoint, calibration, str(recipe), folder / "out" / "rtx5090", folder / "cache")
    yield Made(checkpoint, calibration, recipe, folder / "cache", bundle, time.monotonic() - started)
    patch.undo()


def test_every_program_is_an_engine_for_the_target(made: Made) -> None:
    manifest = made.bundle.manifest
    geometry = small_world.small()
    assert manifest.target.engine == "tensorrt_rtx" and manifest.target.capability == "sm_120" and manifest.config == geometry
    assert len(manifest.programs) == 15 and made.bundle.verify().ok
    assert {"euler_first", "euler_steady", "denoise_second", "text_encoder"} <= set(manifest.programs)
    for name, row in made.report["programs"].items():
        assert row["bytes"] == manifest.files[f"engines/{name}.engine"].size and not row["from_cache"]
        assert row["cubins"] == (["sm_120"] if name.startswith(("denoise", "commit")) else [])
    assert 2**28 < made.report["peak_rss"] < 2**32 and made.report["bytes"] < manifest.total_bytes()


def test_nvfp4_is_on_exactly_the_recipes_layers(made: Made) -> None:
    asked = layer_table(load_recipe(made.recipe), small_world.small().dit)
    realised: dict[str, set[str]] = {}
    for entry in made.bundle.manifest.programs.values():
        for layer, word in entry.extras["layers"].items():
            realised.setdefault(layer, set()).add(word)
    # The attention's projections of equal format are one product each.
    merged = {f"blocks.{i}.attn.merged.{n}": kind for i in range(2) for n, kind in ((0, "nvfp4"), (1, "fp8"))}
    members = {name for name in asked if name.rpartition(".")[2] in ("qkv", "output_gate", "q_proj_cam", "k_proj_cam", "v_proj_cam")}
    expected = {name: entry.format for name, entry in asked.items() if entry.format != "bf16" and name not in members} | merged
    assert {name: words for name, words in realised.items() if words & {"nvfp4", "fp8"}} == {name: {word} for name, word in expected.items()}
    assert made.bundle.manifest.precision.summary["realised"]["nvfp4"] == 6 * sum(word == "nvfp4" for word in expected.values())


def test_plugins_carry_the_kernels_of_the_target(made: Made) -> None:
    extras = made.bundle.manifest.programs["commit_steady"].extras
    assert extras["compiled"]["plugins"] == 1 and extras["gdn"] == "plugin"
    assert [k["name"].split(".")[1] for k in extras["kernels"]] == ["prepare", "summarize", "combine", "apply"]
    assert all(k["capability"] == "sm_120" and 0 < k["registers"] <= 255 and k["bytes"] > 1000 for k in extras["kernels"])
    assert made.bundle.manifest.programs["camera"].extras["compiled"]["plugins"] == 0


def test_the_manifest_says_what_was_not_run(made: Made) -> None:
    summary = bundle_summary(made.bundle)
    assert "No engine of this bundle was run on rtx5090: that it loads, its speed and its numerics there are unverified." in summary["unverified"]
    assert any("does not document plugins" in sentence for sentence in summary["unverified"])
    assert summary["calibration"]["clips"] == 1 and summary["precision"]["summary"]["audited"]
    assert {"tensorrt_rtx", "torch", "triton", "onnx"} <= set(summary["versions"])


def test_inspect_shows_a_person_what_is_inside(made: Made) -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render_bundle(made.bundle))
    text = " ".join(console.export_text().split())
    counts = made.bundle.manifest.precision.summary["realised"]
    assert f"{counts['nvfp4']} nvfp4" in text and "read back from the engines" in text
    assert "1 clips, file" in text and "not measured when it was built" in text and "rtx5090 (sm_120)" in text and "tensorrt_rtx 1." in text
    for kernel in made.bundle.manifest.programs["denoise_steady"].extras["kernels"]:
        assert f"{kernel['name']} │ sm_120 │ {kernel['registers']} │" in text
    assert "unverified: No engine of this bundle was run on rtx5090" in text


def test_a_checked_build_says_how_well_its_graph_agrees(made: Made, tmp_path: Path) -> None:
    bundle = made.again(tmp_path / "out", check=True)
    parity = bundle.manifest.parity
    assert parity is not None and (parity["program"], parity["against"]) == ("denoise_first", "the fake-quantized torch model in bfloat16")
    # The level that test_tensorrt_parity.py explains; a graph without the recipe's scales is below 5.
    assert 18 < parity["sqnr_db"] < 200 and 0 < parity["max_relative_error"] < 0.5
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render_bundle(bundle))
    assert f"{parity['sqnr_db']:.1f} dB against the fake-quantized torch model" in console.export_text()


def test_a_second_build_is_instant(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphSource, "export", lambda *arguments: iter(()))
    started = time.monotonic()
    bundle = made.again(tmp_path / "out")
    assert time.monotonic() - started < made.seconds / 4
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items() if name.startswith("engines/")}
    assert files == {name: entry.sha256 for name, entry in made.bundle.manifest.files.items() if name.startswith("engines/")}
    assert all(row["from_cache"] for row in json.loads(bundle.read("build-report.json"))["programs"].values())


def forget(cache: Path, *programs: str, bundle: Bundle) -> None:
    """Take programs out of a cache."""
    lost = {bundle.manifest.files[f"engines/{name}.engine"].sha256 for name in programs}
    for report in (cache / "engines").glob("*/*/report.json"):
        if json.loads(report.read_text())["built"]["sha256"] in lost:
            shutil.rmtree(report.parent)


def test_a_change_of_one_program_rebuilds_only_that(made: Made, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made.cache, cache)
    forget(cache, "prompt_kv", bundle=made.bundle)
    events: list[str] = []
    bundle = made.again(tmp_path / "out", cache=cache, progress=lambda what, done, total: events.append(what))
    rebuilt = {name for name, row in json.loads(bundle.read("build-report.json"))["programs"].items() if not row["from_cache"]}
    assert rebuilt == {"prompt_kv"}
    assert [what for what in events if what.startswith("lowering")] == ["lowering prompt_kv"]


def test_killing_a_build_leaves_the_old_bundle(made: Made, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    shutil.copytree(made.cache, cache)
    before = made.again(out, cache=cache)
    forget(cache, "euler_first", "text_encoder", "prompt_kv", bundle=made.bundle)
    script = Path(__file__).parent / "small_world.py"
    command = [sys.executable, str(script), *map(str, (made.checkpoint, made.calibration, made.recipe, out, cache))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("lowering text_encoder"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(path.name.startswith("out.partial-") for path in tmp_path.iterdir()), "it was killed in the middle"
    assert Bundle.open(out, verify="full").digest == before.digest
    after = made.again(out, cache=cache, overwrite=True)
    assert not any(path.name.startswith("out.partial-") for path in tmp_path.iterdir())
    rows = json.loads(after.read("build-report.json"))["programs"]
    assert rows["euler_first"]["from_cache"], "what had finished before the kill is kept"
    assert not rows["prompt_kv"]["from_cache"]


def request(made: Made, target: str = "rtx5090", precision: str = "bf16", engine: str = "tensorrt_rtx") -> BuildRequest:
    return BuildRequest(open_checkpoint(made.checkpoint), resolve_target(target), engine, precision)


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("h200", "bf16", r"^the tensorrt_rtx engine does not serve h200; use --engine cuda or tensorrt$"),
        ("rtx4090", "recipe", r"^rtx4090 does not compute nvfp4 with the tensorrt_rtx engine; use --precision fp16 or bf16 or fp8$"),
        ("rtx5090", "fp32", r"^rtx5090 does not compute fp32"),
        ("rtx5090", "nvfp5", r"unknown recipe 'nvfp5'; choose one of "),
        ("cpu", "bf16", r"^tensorrt_rtx builds for GPUs, found target cpu; use --engine onnxruntime for it$"),
    ],
)
def test_what_cannot_be_built(made: Made, tmp_path: Path, target: str, precision: str, message: str) -> None:
    precision = str(made.recipe) if precision == "recipe" else precision
    with pytest.raises(UserError, match=message):
        build_tensorrt(request(made, target, precision), tmp_path / "out", options=TensorRTOptions(calibration=made.calibration, cache=made.cache))
    assert not list(tmp_path.iterdir())


def test_quantized_precisions_need_a_calibration_of_the_checkpoint(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs calibrated scales; run `sanawm calibrate` and give its file with --calibration"):
        build_tensorrt(request(made, precision="nvfp4"), tmp_path / "out", options=TensorRTOptions(cache=made.cache))
    text = json.loads(made.calibration.read_text())
    text["checkpoint"]["fingerprint"] = "0" * 64
    shutil.copy(made.calibration.with_suffix(".safetensors"), tmp_path / "calibration.safetensors")
    (tmp_path / "calibration.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="the calibration is of another checkpoint"):
        options = TensorRTOptions(cache=made.cache, calibration=tmp_path / "calibration.json")
        build_tensorrt(request(made, precision="nvfp4"), tmp_path / "out", options=options)


def test_targets_built_together_share_everything_else(made: Made, tmp_path: Path) -> None:
    pair = [(request(made), tmp_path / "a"), (request(made, "rtx4090", "fp8"), tmp_path / "b")]
    with pytest.raises(UserError, match="share checkpoint, precision, clip length and engine"):
        build_tensorrt_targets(pair)


def test_full_tensorrt_builds_for_the_gpu_it_runs_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("tensorrt", SimpleNamespace(), "11.3.0")
    monkeypatch.setattr(build_module, "open_library", lambda engine: library)
    with pytest.raises(UserError, match=r"^TensorRT 11\.3\.0 builds for the GPU it runs on, and no NVIDIA GPU was found here; build where there is a h200$"):
        build_tensorrt(request(made, "h200", engine="tensorrt"), tmp_path / "out")
    monkeypatch.setattr(build_module, "device_capability", lambda: "sm_90")
    with pytest.raises(UserError, match=r"the GPU here is sm_90; build where there is a b200"):
        build_tensorrt(request(made, "b200", engine="tensorrt"), tmp_path / "out")


def test_all_programs_of_the_model_are_there(made: Made) -> None:
    from sanawm.programs import Geometry

    entry = made.bundle.manifest.programs["denoise_first"]
    latents = next(t for t in entry.inputs if t.name == "latents")
    prompt = next(t for t in made.bundle.manifest.programs["text_encoder"].inputs if t.name == "input_ids")
    table = programs(Geometry(small_world.small(), prompt.shape[1], latents.shape[2], "bfloat16"))
    for name, program in table.items():
        found = made.bundle.manifest.programs[name]
        for side in ("inputs", "outputs"):
            assert [(t.name, t.dtype, t.shape) for t in getattr(found, side)] == [(t.name, t.dtype, t.shape) for t in getattr(program, side)]

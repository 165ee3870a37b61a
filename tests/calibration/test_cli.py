"""`sanawm calibrate` end to end on a synthetic checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import sanawm
from sanawm.config import tiny_config
from sanawm.errors import CheckpointError, InputError, UserError
from sanawm.model.checkpoint.synth import synthesize
from sanawm_calibration import modelopt_cpu, store
from sanawm_calibration.cli import calibrate
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.recipe import layer_table, load_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tiny_config()
    small = replace(tiny, name="small", dit=replace(tiny.dit, hidden=64, depth=2, softmax_every=2, height=3, width=4))
    return synthesize(tmp_path_factory.mktemp("checkpoint") / "small", small, seed=2)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate, [str(a) for a in arguments])


def test_calibrate_search_and_report(checkpoint: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "cal.json", tmp_path / "report.html"
    arguments = ("--checkpoint", checkpoint, "-o", output, "--clips", 2, "--chunks", 3, "--rows", 64, "--judged", 1)
    result = invoke(*arguments, "--search", "--report", report, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [Path(f).name for f in data["files"]] == ["cal.json", "cal.safetensors", "cal-frontier.png", "report.html", "report.json"]
    assert all(Path(f).stat().st_size > 1000 for f in data["files"])
    assert data["clips"] == 2 and data["report"]["recipe"] == "mixed" and data["report"]["passed"]
    assert data["search"]["target"] == "rtx5090" and sum(data["search"]["formats"].values()) == 41
    measured = {p["label"]: p for p in data["search"]["recipes"]}
    assert set(measured) == {"fp8", "nvfp4", "nvfp4-guarded", "nvfp4-official"}
    assert all(p["measured"] and p["nbytes"] > 0 for p in measured.values())
    # What the search chose is what the recipe named mixed means from now on.
    calibration = store.read(output)
    table = layer_table(load_recipe("mixed"), calibration.config.dit, calibration.found_table())
    assert calibration.search is not None and {n: f.to_json() for n, f in table.items()} == calibration.search["layers"]
    assert calibration.clips[0]["motion"] == "still" and calibration.versions["nvidia-modelopt"]
    html = report.read_text()
    assert html.count("<img") == 8 and "Frontier" in html
    assert json.loads(report.with_suffix(".json").read_text())["recipe"] == "mixed"

    # A second run finds its clips done; the plain output is for people.
    again = invoke(*arguments)
    assert again.exit_code == 0 and "2 clips of 73 to 73 frames" in again.stdout and "wrote" in again.stdout
    assert store.read(output).summary == calibration.summary


def error_of(result: Result) -> UserError:
    assert isinstance(result.exception, UserError), (result.exception, result.output)
    return result.exception


def test_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    base = ("--checkpoint", checkpoint, "-o", tmp_path / "cal.json")
    assert isinstance(error_of(invoke("--checkpoint", tmp_path / "none")), CheckpointError)
    assert "never reaches the steady window" in str(error_of(invoke(*base, "--clips", 1, "--chunks", 2)))
    assert "end in .json" in str(error_of(invoke("--checkpoint", checkpoint, "-o", tmp_path / "cal.txt")))
    assert "no rates are known" in str(error_of(invoke(*base, "--target", "tpu")))
    assert "unknown recipe" in str(error_of(invoke(*base, "--recipe", "int8")))
    assert isinstance(error_of(invoke(*base, "--data", tmp_path / "nothing")), CalibrationError)
    assert not (tmp_path / "cal.json").exists()


def test_a_missing_gpu_is_said(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = error_of(invoke("--checkpoint", checkpoint, "-o", tmp_path / "cal.json", "--device", "cuda"))
    assert isinstance(error, InputError) and "--device cpu" in str(error)


def test_statistics_need_no_modelopt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        """An import system without modelopt."""

        def find_spec(self, name: str, *rest: object) -> None:
            if name.partition(".")[0] == "modelopt":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    version = importlib.metadata.version

    def installed(package: str) -> str:
        if package == "nvidia-modelopt":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    modelopt_cpu.load.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.setattr(importlib.metadata, "version", installed)
    arguments = ("--checkpoint", checkpoint, "-o", tmp_path / "cal.json", "--clips", 1, "--chunks", 3, "--rows", 4)
    # What does need it says so before the rollouts.
    for option in (("--search",), ("--report", tmp_path / "report.html")):
        assert "modelopt" in str(error_of(invoke(*arguments, *option)))
        assert not any(tmp_path.iterdir())
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    versions = store.read(tmp_path / "cal.json").versions
    assert set(versions) == {"sanawm", "torch"} and versions["sanawm"] == sanawm.__version__

"""Checkpoint descriptions: the data, what is wrong inside, and the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sanawm.config import tiny_config
from sanawm.errors import CheckpointError, UserError
from sanawm.keys import dit_tensors, parameters, text_tensors, vae_tensors
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.inspect import expected, inspect_checkpoint
from sanawm.model.checkpoint.report import render_expected, render_inspection
from sanawm.model.checkpoint.synth import LAYOUTS, SynthLayout, synthesize


def text_of(renderable: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_good_checkpoint(layout: SynthLayout, tmp_path: Path) -> None:
    report = inspect_checkpoint(synthesize(tmp_path / "tiny", "tiny", layout=layout, dtype="bfloat16"))
    json.dumps(report)
    assert report["ok"] and report["problems"] == [] and report["kind"] == layout
    assert report["config"]["dit"] == report["dit"] and report["dit"]["hidden"] == tiny_config().dit.hidden
    assert report["chi_prompt"]["released"] is False
    parts = report["parts"]
    config = tiny_config()
    for part, table in (
        ("dit", dit_tensors(config.dit)),
        ("vae", vae_tensors(config.vae)),
        ("text_encoder", text_tensors(config.text)),
    ):
        assert parts[part]["parameters"] == parameters(table) == sum(parts[part]["groups"].values())
        assert parts[part]["dtypes"] == {"bfloat16": parts[part]["tensors"]}
        assert parts[part]["differences"] == {"missing": [], "extra": [], "misshaped": []}
        for file in parts[part]["files"]:
            assert file["bytes"] > 0
    ignored = parts["dit"]["ignored"]
    assert "raymap_embedder.proj.weight" in ignored and ("pos_embed" in ignored) == (layout != "diffusers")
    text = text_of(render_inspection(report))
    assert "320x192 pixels" in text and f"{parts['dit']['parameters']:,}" in text and "all tensors as expected" in text


def test_differences_are_reported_not_raised(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "tiny", "tiny", layout="bidirectional")
    file = root / "dit" / "sana_wm_1600m_720p.safetensors"
    weights = load_file(file)
    del weights["blocks.2.attn.conv_k.weight"]
    weights["t_block.1.bias"] = torch.zeros(5)
    weights["more"] = torch.zeros(2, 3)
    save_file(weights, file)
    for source in (root, file):
        report = inspect_checkpoint(source)
        assert not report["ok"]
        assert report["parts"]["dit"]["differences"] == {
            "missing": ["blocks.2.attn.conv_k.weight"],
            "extra": ["more"],
            "misshaped": [{"name": "t_block.1.bias", "expected": [768], "found": [5]}],
        }
        assert report["parts"]["dit"]["groups"]["unexpected"] == 6
        (problem,) = report["problems"]
        assert "blocks.2.attn.conv_k.weight" in problem and "3 differ" in problem
        assert "1 unexpected: more" in text_of(render_inspection(report))


def test_damaged_part_does_not_hide_the_others(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "tiny", "tiny")
    file = root / "ltx2_causal_vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    report = inspect_checkpoint(root)
    assert set(report["parts"]) == {"dit", "text_encoder"}
    assert len(report["problems"]) == 1 and "not a complete safetensors file" in report["problems"][0]
    assert "1 problem(s)" in text_of(render_inspection(report))


def test_single_file_and_open_checkpoint(tmp_path: Path) -> None:
    file = synthesize(tmp_path / "tiny", "tiny", text=False) / "sana_dit" / "model.pt"
    report = inspect_checkpoint(open_checkpoint(file))
    assert report["ok"] and report["config"] is None and report["kind"] == "file"
    assert report["dit"]["depth"] == tiny_config().dit.depth
    assert "4 blocks of width 128" in text_of(render_inspection(report))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a SANA-WM checkpoint"):
        inspect_checkpoint(tmp_path)


def test_expected_tables() -> None:
    full = expected("full")
    assert set(full) == {"tensors", "parameters"}
    assert full["parameters"] == 2_661_800_448 and len(full["tensors"]) == 850
    assert full["tensors"]["blocks.0.attn.qkv.weight"] == [6720, 2240]
    assert not any("recall_gate" in name for name in full["tensors"])
    assert expected("tiny")["parameters"] == parameters(dit_tensors(tiny_config().dit))
    text = text_of(render_expected("full", full))
    assert "850 tensors, 2,661,800,448 parameters" in text and "6720x2240" in text
    with pytest.raises(UserError, match="unknown preset"):
        expected("huge")


def test_safetensors_layouts_are_written_and_described_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'diffusers', 'onnx']))\n"
        "from sanawm.model.checkpoint.inspect import expected, inspect_checkpoint\n"
        "from sanawm.model.checkpoint.report import render_inspection\n"
        "from sanawm.model.checkpoint.synth import synthesize\n"
        f"report = inspect_checkpoint(synthesize({str(tmp_path / 'tiny')!r}, 'tiny', layout='bidirectional', dtype='bfloat16'))\n"
        "assert report['ok'], report['problems']\n"
        "render_inspection(report), expected('full')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module, source", [("yaml", "local"), ("huggingface_hub", "hf://owner/repo")])
def test_missing_library_is_named(module: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = synthesize(tmp_path / "tiny", "tiny", text=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}, which is not installed; run: pip install 'sanawm\[export\]'"):
        open_checkpoint(root if source == "local" else source).check()

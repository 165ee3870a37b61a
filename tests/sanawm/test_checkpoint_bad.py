"""Damaged, hostile and mismatched checkpoints: each one clear sentence or a report, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sanawm.errors import CheckpointError
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.synth import synthesize

DIT = "dit/sana_wm_1600m_720p.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("bad") / "tiny", "tiny", layout="bidirectional")


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def edit(root: Path, change: dict[str, Any]) -> None:
    data = yaml.safe_load((root / "config.yaml").read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (root / "config.yaml").write_text(yaml.safe_dump(data))


def refused(path: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as info:
        checkpoint = open_checkpoint(path)
        checkpoint.check()
        checkpoint.load_dit()
    assert "weights_only" not in str(info.value), "torch advises to switch the protection off"
    return str(info.value)


def test_pristine_passes(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    checkpoint.check()
    assert len(checkpoint.load_dit()) == 190


def test_missing_extra_and_misshaped_tensors(root: Path) -> None:
    weights = load_file(root / DIT)
    for index in range(4):
        for name in ("weight", "bias"):
            del weights[f"blocks.{index}.cross_attn.proj.{name}"]
    weights["blocks.0.attn.lora_a"] = torch.zeros(2)
    weights["t_block.1.bias"] = torch.zeros(5)
    save_file(weights, root / DIT)
    report = refused(root, "10 differ")
    assert "8 missing: blocks.0.cross_attn.proj.weight, blocks.0.cross_attn.proj.bias" in report and "3 more" in report
    assert "1 unexpected: blocks.0.attn.lora_a" in report
    assert "1 of another shape: t_block.1.bias is 5, expected 768" in report
    assert len(report.splitlines()) == 5


@pytest.mark.parametrize("part, file", [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")])
def test_missing_tensor_of_another_part(root: Path, part: str, file: str) -> None:
    weights = load_file(root / part / file)
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, root / part / file)
    assert gone.removeprefix("model.") in refused(root, "1 missing")


def test_statistics_of_the_vae_are_required(root: Path) -> None:
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["latents_std"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="1 missing: latents_std"):
        open_checkpoint(root).load_vae("decoder")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool, place: str) -> None:
    proof = tmp_path / "proof"
    state: dict[str, Any] = {"model.x_embedder.proj.weight": torch.zeros(4, 2, 1, 1, 1)}
    whole: dict[str, Any] = {"generator": state}
    (whole if place == "beside" else state)["hook"] = Payload(proof)
    torch.save(whole, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    report = refused(tmp_path / "model.pt", "holds more than tensors: loading it would run `posix.mkdir`")
    assert not proof.exists()
    assert ".safetensors" in report and "\n" not in report


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload(proof), protocol=protocol))
    refused(tmp_path / "model.pt", "would run|damaged or not a torch checkpoint")
    assert not proof.exists()


@pytest.mark.parametrize("part", [0, 7, 100, 0.5, -1])
def test_truncated_safetensors(root: Path, part: float) -> None:
    content = (root / DIT).read_bytes()
    keep = int(part * len(content)) if 0 < part < 1 else int(part)
    (root / DIT).write_bytes(content[:keep])
    refused(root, "not a complete safetensors file")


@pytest.mark.parametrize("part", [0, 1, 50, 0.5, -1])
def test_truncated_torch_file(tmp_path: Path, part: float) -> None:
    torch.save({"generator": {"model.x": torch.zeros(1000)}}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    keep = int(part * len(content)) if 0 < part < 1 else int(part)
    (tmp_path / "model.pt").write_bytes(content[:keep])
    refused(tmp_path / "model.pt", "cut short|damaged")


def test_torch_file_without_a_model(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "generator": 5}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "no tensors under generator or state_dict or at its top level; found: epoch, generator")
    torch.save([1, 2], tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "found: list")


def test_another_model(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "expected the stage-1 transformer of a SANA-WM checkpoint")


def test_wrong_layout(tmp_path: Path) -> None:
    (tmp_path / "refiner").mkdir()
    report = refused(tmp_path, "is not a SANA-WM checkpoint")
    for looked_for in ("sana_dit/model.pt", "dit/*.safetensors", "transformer/*.safetensors", "found refiner"):
        assert looked_for in report
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "readme.md").write_text("hello")
    refused(tmp_path / "readme.md", "not a checkpoint; expected a folder")


def test_two_files_without_an_index(root: Path) -> None:
    shutil.copy(root / DIT, root / "dit" / "other.safetensors")
    refused(root, "several safetensors files")


def test_index_that_leaves_its_folder(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "tiny", "tiny", layout="diffusers", text=False)
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    index = file.with_name(file.name + ".index.json")
    for content, match in (
        ({"weight_map": {"x": "../../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": [1]}, "is not a safetensors index"),
        ([], "is not a safetensors index"),
    ):
        index.write_text(json.dumps(content))
        refused(root, match)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"sanawm.dit.hidden": 256}, "of another shape"),
        ({"sanawm.dit.depth": 5}, "missing: blocks.4"),
        ({"sanawm.dit.softmax_every": 2}, "blocks.1.attn.conv_k.weight"),
        ({"sanawm.dit.colour": 1}, "section sanawm: config.dit: unknown fields colour"),
        ({"sanawm.dit": 3}, "section sanawm: config.dit: expected an object"),
        ({"sanawm.vae.decoder_causal": True}, r"the vae folder's config\.json differ \(decoder_causal False instead of True\)"),
        ({"sanawm.text.layers": 3}, r"the text folder's config\.json differ \(layers 2 instead of 3\)"),
    ],
)
def test_section_that_contradicts_the_tensors(root: Path, change: dict[str, Any], match: str) -> None:
    edit(root, change)
    refused(root, match)


def test_bad_yaml(root: Path) -> None:
    code = "!!python/object/apply:os.getcwd []"
    for content, match in (("a: [1", "not valid YAML"), ("- 1", "expected a mapping"), (code, "not valid YAML")):
        (root / "config.yaml").write_text(content)
        refused(root, match)


@pytest.mark.parametrize(
    "part, change, match",
    [
        ("vae", {"timestep_conditioning": True}, "timestep_conditioning is True, expected False"),
        ("vae", {"block_out_channels": "wide"}, "expected whole numbers"),
        ("text_encoder", {"model_type": "gemma3"}, "expected gemma2"),
    ],
)
def test_configuration_of_another_architecture(root: Path, part: str, change: dict[str, Any], match: str) -> None:
    file = root / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(root, match)
    file.write_text("{")
    refused(root, "not valid JSON")
    file.unlink()
    refused(root, "is missing")

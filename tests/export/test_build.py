"""Building a bundle from a checkpoint: what is in it, what is refused, and what a failure leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sanawm
from sanawm.errors import CheckpointError, UserError
from sanawm.model.checkpoint import Checkpoint, open_checkpoint
from sanawm.model.checkpoint.synth import synthesize
from sanawm.model.dit import SanaWM
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE
from sanawm.programs import programs
from sanawm_export import build
from sanawm_export.build import BUILDERS, BuildRequest, EngineBuilder, build_bundles, build_onnxruntime, geometry_of, open_prompt
from sanawm_export.parts import load_part
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.targets import resolve_target


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def request_of(checkpoint: Checkpoint) -> Callable[..., BuildRequest]:
    """request_of(**changes): a request for the CPU."""

    def make(**changes: Any) -> BuildRequest:
        return replace(BuildRequest(checkpoint, resolve_target("cpu"), "onnxruntime", "fp32"), **changes)

    return make


def test_manifest(tiny_bundle: Path, checkpoint: Checkpoint) -> None:
    manifest = Bundle.open(tiny_bundle, verify="full").manifest
    assert manifest.name == "tiny" and manifest.config == checkpoint.world
    assert (manifest.target.name, manifest.target.engine, manifest.target.capability) == ("cpu", "onnxruntime", None)
    assert manifest.precision.recipe == "fp32" and manifest.precision.summary == {"activations": "float32", "weights": "float32"}
    assert manifest.checkpoint.sha256 == checkpoint.fingerprint() and manifest.checkpoint.kind == "streaming"
    assert manifest.versions["sanawm"] == sanawm.__version__ and manifest.versions["torch"] == torch.__version__
    assert {"onnx", "onnxscript", "transformers", "onnxruntime"} <= set(manifest.versions) and not manifest.unverified


def test_program_table(tiny_bundle: Path, request_of: Callable[..., BuildRequest], checkpoint: Checkpoint) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    table = programs(geometry_of(request_of(), open_prompt(checkpoint)))
    assert set(manifest.programs) == set(table)
    for name, program in table.items():
        entry = manifest.programs[name]
        for stated, found in ((program.inputs, entry.inputs), (program.outputs, entry.outputs)):
            assert [(t.name, t.dtype, t.shape) for t in stated] == [(t.name, t.dtype, t.shape) for t in found]
        assert entry.file == f"programs/{name}.onnx" and entry.extras["weights"] in manifest.files


def test_every_file_is_named(tiny_bundle: Path, checkpoint: Checkpoint) -> None:
    bundle = Bundle.open(tiny_bundle)
    weights = {f"programs/{part}.safetensors" for part in ("text", "vae", "dit")}
    graphs = {f"programs/{name}.onnx" for name in bundle.manifest.programs}
    assert set(bundle.manifest.files) == weights | graphs | {"prompt/tokenizer.json", "prompt/prompt.json"}
    assert not bundle.verify().by_state("extra")
    assert json.loads(bundle.read("prompt/prompt.json")) == {"chi": checkpoint.chi_prompt} and checkpoint.chi_prompt
    assert checkpoint.tokenizer_file is not None and bundle.read("prompt/tokenizer.json") == checkpoint.tokenizer_file.read_bytes()


@pytest.mark.parametrize(("latents", "first"), [(121, 4), (120, 3), (122, 5), (3, 3)])
def test_first_chunk(latents: int, first: int, request_of: Callable[..., BuildRequest], checkpoint: Checkpoint) -> None:
    """The length of the clips to be made decides it."""
    geometry = geometry_of(request_of(latent_frames=latents), open_prompt(checkpoint))
    assert geometry.first_frames == first and geometry.config == checkpoint.world and geometry.dtype == "float32"
    # The instruction and the prompt share the text encoder's input but for one token each.
    assert geometry.prompt_tokens == open_prompt(checkpoint).max_length > checkpoint.world.dit.text_tokens


def test_precisions(request_of: Callable[..., BuildRequest], checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert geometry_of(request_of(precision="bf16"), open_prompt(checkpoint)).dtype == "bfloat16"
    with pytest.raises(UserError, match="the onnxruntime engine computes fp32 or bf16, found --precision fp8"):
        build_onnxruntime(request_of(precision="fp8"), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_default_precisions_are_what_engines_compute() -> None:
    for engine, target in (("onnxruntime", "cpu"), ("tensorrt_rtx", "rtx5090"), ("tensorrt", "h200"), ("cuda", "h200")):
        resolve_target(target).require(engine, BUILDERS[engine].default_precision)


def test_targets_of_one_engine_and_precision_are_built_together(monkeypatch: pytest.MonkeyPatch, request_of: Callable[..., BuildRequest]) -> None:
    calls: list[list[str]] = []

    def builder(requests: Any, overwrite: bool, progress: Any) -> list[Any]:
        calls.append([request.target.name for request, _ in requests])
        return [out for _, out in requests]

    monkeypatch.setitem(BUILDERS, "tensorrt_rtx", EngineBuilder(builder, "bf16"))
    monkeypatch.setitem(BUILDERS, "cuda", EngineBuilder(builder, "bf16"))
    asked = [("rtx5090", "tensorrt_rtx"), ("h200", "cuda"), ("rtx4090", "tensorrt_rtx")]
    requests = [(replace(request_of(), target=resolve_target(name), engine=engine), Path(name)) for name, engine in asked]
    assert build_bundles(requests) == [Path(name) for name, _ in asked]
    assert calls == [["rtx5090", "rtx4090"], ["h200"]]


@pytest.mark.parametrize(("name", "kind"), [("text", TextEncoder), ("vae", VideoVAE), ("dit", SanaWM)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts(name: str, kind: type, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    part = load_part(checkpoint, name, dtype)
    assert isinstance(part, kind) and not part.training
    parameters = list(part.parameters())
    assert parameters and all(p.dtype == dtype and not p.requires_grad and p.device.type == "cpu" for p in parameters)


@pytest.mark.parametrize(("precision", "least"), [("fp32", 100), ("bf16", 25)])
def test_the_check_compares_what_is_exported(request_of: Callable[..., BuildRequest], checkpoint: Checkpoint, precision: str, least: float) -> None:
    """float32: ONNX Runtime and torch sum in other orders. bfloat16: both round every product, here and there differently (about 2^-9 each)."""
    request = request_of(precision=precision)
    found = build._check(request, geometry_of(request, open_prompt(checkpoint)))
    assert found["program"] == "denoise_first" and found["engine"].startswith("ONNX Runtime") and least < found["sqnr_db"] < 200


def test_a_checkpoint_without_a_text_encoder(tmp_path: Path) -> None:
    bare = open_checkpoint(synthesize(tmp_path / "bare", "tiny", text=False))
    with pytest.raises(CheckpointError, match=r"has no text encoder; give the Gemma-2 one with --text-encoder"):
        load_part(bare, "text", torch.float32)
    request = BuildRequest(bare, resolve_target("cpu"), "onnxruntime", "fp32")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; give the text encoder's folder with --text-encoder"):
        build_onnxruntime(request, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n    depth: 4", "\n    depth: 5", r"missing: blocks\.4\."),
        ("\n    sink: true", "\n    sink: false", "compiled programs attend to the first and the previous chunk"),
    ],
    ids=["weights", "window"],
)
def test_a_checkpoint_that_does_not_fit(old: str, new: str, message: str, tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "other", "tiny")
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    request = BuildRequest(open_checkpoint(folder), resolve_target("cpu"), "onnxruntime", "fp32")
    with pytest.raises(UserError, match=message):
        build_onnxruntime(request, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_failure_leaves_what_was_there(request_of: Callable[..., BuildRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "bundle"
    old.mkdir()
    (old / "manifest.json").write_text("kept")

    def fail(*arguments: Any, on_program: Callable[[str], None], **options: Any) -> Any:
        on_program("text_encoder")
        raise RuntimeError("no space")

    started: list[tuple[str, int, int]] = []
    monkeypatch.setattr(build, "export_part", fail)
    with pytest.raises(RuntimeError, match="no space"):
        build_onnxruntime(request_of(), old, overwrite=True, progress=lambda *told: started.append(told))
    assert started == [("text_encoder", 1, 13)]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"] and (old / "manifest.json").read_text() == "kept"


def test_an_existing_bundle_is_kept_unless_told_otherwise(request_of: Callable[..., BuildRequest], tiny_bundle: Path) -> None:
    before = (tiny_bundle / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists"):
        build_onnxruntime(request_of(), tiny_bundle)
    assert (tiny_bundle / "manifest.json").read_bytes() == before

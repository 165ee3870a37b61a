"""Text encoder against transformers' Gemma-2, and as an ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Model

from sanawm.config import tiny_config
from sanawm.errors import CheckpointError
from sanawm.model.checkpoint.synth import synthesize
from sanawm.model.text import TextEncoder
from sanawm_runtime.engines.onnxruntime import session_options

LENGTH, TOKENS = 60, 24
SELECTED = [0, *range(-TOKENS + 1, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("text") / "tiny", "tiny", layout="bidirectional") / "text_encoder"


def tokens(real: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 512, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) < real).long()[None]
    ids[0, 0] = 2
    return ids * mask, mask


@pytest.mark.parametrize("real", [3, 40, LENGTH])
@pytest.mark.parametrize("window", [4096, 16])
def test_equals_transformers_with_its_own_mask(folder: Path, real: int, window: int) -> None:
    encoder = TextEncoder.from_folder(folder, TOKENS, torch.float32)
    model: Any = Gemma2Model.from_pretrained(folder, dtype=torch.float32)
    encoder.model.config.sliding_window = model.config.sliding_window = window
    for layer in model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    ids, mask = tokens(real)
    with torch.no_grad():
        text, selected = encoder(ids, mask)
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, SELECTED]
    assert selected.dtype == torch.bool and torch.equal(selected, mask[:, SELECTED].bool())
    # The same operations in the same order; the margin is for another blocking of the matrix products.
    torch.testing.assert_close(text, want, atol=1e-5, rtol=0)
    assert want.std() > 0.1


def test_window_matters(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, TOKENS, torch.float32)
    ids, mask = tokens(LENGTH)
    with torch.no_grad():
        wide = encoder(ids, mask)[0]
        encoder.model.config.sliding_window = 8
        narrow = encoder(ids, mask)[0]
    assert (wide - narrow).abs().max() > 1e-3


def test_padding_does_not_change_real_tokens(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, LENGTH, torch.float32)
    ids, mask = tokens(30)
    other = ids.clone()
    other[0, 30:] = 7
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids, mask)[0][:, :30], encoder(other, mask)[0][:, :30], atol=0, rtol=0)


def test_export(folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(folder, TOKENS, torch.float32)
    ids, mask = tokens(40)
    file = tmp_path / "text.onnx"
    program: Any = torch.onnx.export(
        encoder,
        (ids, mask),
        dynamo=True,
        opset_version=23,
        input_names=["input_ids", "attention_mask"],
        output_names=["text", "text_mask"],
        verbose=False,
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file, session_options())
    assert session.get_outputs()[0].shape == [1, TOKENS, encoder.model.config.hidden_size]
    for real in (40, 9):
        ids, mask = tokens(real, seed=real)
        with torch.no_grad():
            want, want_mask = encoder(ids, mask)
        text, text_mask = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        # fp32 on another runtime: reductions in another order.
        assert np.abs(text - want.numpy()).max() <= 2e-5 * want.abs().max().item()
        np.testing.assert_array_equal(text_mask, want_mask.numpy())


def test_dtype(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, TOKENS, torch.bfloat16)
    full = TextEncoder.from_folder(folder, TOKENS, torch.float32)
    ids, mask = tokens(40)
    with torch.no_grad():
        text, want = encoder(ids, mask)[0], full(ids, mask)[0]
    assert text.dtype == torch.bfloat16 and text.isfinite().all()
    # bfloat16 keeps 8 bits: 2 layers of roundings of 2**-9 relative on values near one.
    assert (text.float() - want).abs().mean() < 0.03


def test_from_config() -> None:
    config = tiny_config().text
    encoder = TextEncoder.from_config(config, TOKENS)
    ids, mask = tokens(40)
    with torch.no_grad():
        text, _ = encoder(ids, mask)
    assert text.shape == (1, TOKENS, config.hidden) and text.dtype == torch.float32
    assert encoder.model.config.query_pre_attn_scalar == config.query_pre_attn_scalar


def test_missing_tensor_is_reported(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.1\.mlp\.up_proj\.weight"):
        TextEncoder.from_folder(tmp_path, TOKENS)


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="model_type is llama, expected gemma2"):
        TextEncoder.from_folder(tmp_path, TOKENS)

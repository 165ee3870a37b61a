"""Synthetic checkpoints: values, files that other readers understand, layouts, and what an interruption leaves."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, SanaWMTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2ForCausalLM

from sanawm.config import tiny_config
from sanawm.errors import CheckpointError
from sanawm.keys import dit_tensors, text_tensors, to_diffusers, vae_tensors
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.synth import LAYOUTS, SynthLayout, synth_tensor, synthesize
from sanawm.model.checkpoint.tiny_tokenizer import build_tokenizer
from sanawm.model.checkpoint.values import BLOCK, OUTLIER_WEIGHT, bfloat16_bits, outlier_channels, synth_blocks
from sanawm.model.checkpoint.writers import Entry, write_safetensors, write_torch

SHAPES: list[tuple[int, ...]] = [(3, 5), (1,), (), (700, 900), (2, 1, 3)]


def fill(entry: Entry):  # type: ignore[no-untyped-def]
    for block in synth_blocks(entry.key, entry.shape, 7):
        yield (bfloat16_bits(block) if entry.dtype == "bfloat16" else block).data.cast("B")


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint16, st.integers(1, 20), elements=st.integers(0, 0x7F7F)), st.booleans())
def test_bfloat16_rounding_is_torchs(kept: np.ndarray, negative: bool) -> None:
    # Every kept half with the discarded halves around a tie.
    dropped = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (kept.astype(np.uint32)[:, None] << 16 | dropped | np.uint32(negative << 31)).reshape(-1)
    values = bits.view(np.float32)
    want = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_bits(values), want)


def test_every_tensor_is_nonzero_and_finite() -> None:
    config = tiny_config()
    for table in (dit_tensors(config.dit), vae_tensors(config.vae), text_tensors(config.text)):
        for name, info in table.items():
            values = synth_tensor(name, info.shape, 0)
            assert values.shape == info.shape and values.dtype == np.float32
            assert np.isfinite(values).all() and (values != 0).any(), name


def test_values_depend_on_name_and_seed_only() -> None:
    name, shape = "blocks.1.attn.proj.weight", (64, 64)
    first = synth_tensor(name, shape, 3)
    np.testing.assert_array_equal(first, synth_tensor(name, shape, 3))
    assert not np.array_equal(first, synth_tensor(name, shape, 4))
    assert not np.array_equal(first, synth_tensor("blocks.2.attn.proj.weight", shape, 3))


def test_blocks_are_small_and_add_up() -> None:
    name, shape = "blocks.0.mlp.inverted_conv.conv.weight", (3000, 500, 1, 1)
    pieces = list(synth_blocks(name, shape, 0))
    assert len(pieces) > 1 and max(piece.size for piece in pieces) <= BLOCK
    np.testing.assert_array_equal(np.concatenate(pieces).reshape(shape), synth_tensor(name, shape, 0))


def test_statistics() -> None:
    matrix = synth_tensor("blocks.0.attn.qkv.weight", (1536, 1024), 0)
    columns = matrix.std(0) * 32  # 1 / sqrt(fan-in) is 1/32
    outliers = columns > OUTLIER_WEIGHT / 2
    assert outliers.sum() == 2
    # The standard deviation of 1536 normals is within 10 % (five standard errors).
    assert np.abs(columns[~outliers] - 1).max() < 0.1
    assert np.abs(columns[outliers] / OUTLIER_WEIGHT - 1).max() < 0.1

    decay = synth_tensor("blocks.0.attn.A_log", (20,), 0)
    assert ((decay > -0.5) & (decay < 0)).all()
    bias = synth_tensor("blocks.0.attn.dt_bias", (20,), 0)
    assert ((bias >= -5) & (bias <= -1)).all()
    short = synth_tensor("blocks.0.attn.conv_k.weight", (640, 1, 4), 0)
    assert short[..., 3].mean() == pytest.approx(1, abs=0.03) and abs(short[..., :3].mean()) < 0.03
    norm = synth_tensor("blocks.0.attn.q_norm.weight", (640,), 0)
    assert norm.min() > 0 and norm.mean() == pytest.approx(1, abs=0.03)
    gemma = synth_tensor("layers.0.input_layernorm.weight", (640,), 0)
    assert gemma.mean() == pytest.approx(0, abs=0.03)
    assert (synth_tensor("latents_std", (128,), 0) > 0.5).all()


def test_modulation_outliers_are_the_same_in_every_block() -> None:
    channels = outlier_channels(512, 0)
    assert len(channels) == 2
    for block in (0, 3):
        table = synth_tensor(f"blocks.{block}.scale_shift_table", (6, 512), 0)
        for row in range(6):
            large = np.flatnonzero(np.abs(table[row]) > 2)
            np.testing.assert_array_equal(large, channels if row in (1, 4) else [])


def test_safetensors_writer(tmp_path: Path) -> None:
    entries = {f"t{i}": Entry(f"t{i}", shape, "float32" if i % 2 else "bfloat16") for i, shape in enumerate(SHAPES)}
    write_safetensors(tmp_path / "a.safetensors", entries, fill, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(entries)
    for name, entry in entries.items():
        want = torch.from_numpy(synth_tensor(name, entry.shape, 7)).to(getattr(torch, entry.dtype))
        assert torch.equal(found[name], want)


def test_torch_writer(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    entries = [Entry(f"t{i}", shape, "float32" if i % 2 else "bfloat16") for i, shape in enumerate(SHAPES)]
    write_torch(file, {"a": {entry.key: entry for entry in entries[:3]}, "b": [{0: entries[3]}, (entries[4], 1.5)], "step": 9}, fill)
    for mmap in (True, False):
        loaded = torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
        found = [*loaded["a"].values(), loaded["b"][0][0], loaded["b"][1][0]]
        assert list(loaded["a"]) == ["t0", "t1", "t2"] and loaded["step"] == 9 and loaded["b"][1][1] == 1.5
        for entry, tensor in zip(entries, found, strict=True):
            assert torch.equal(tensor, torch.from_numpy(synth_tensor(entry.key, entry.shape, 7)).to(getattr(torch, entry.dtype)))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None, "checksums"
    reader: Any = torch._C.PyTorchFileReader(str(file))
    assert all(reader.get_record_offset(f"data/{i}") % 64 == 0 for i in range(len(SHAPES)))


def test_writers_hold_no_whole_tensor(tmp_path: Path) -> None:
    entry = Entry("blocks.0.attn.qkv.weight", (4096, 4096), "float32")  # 64 MiB
    write_torch(tmp_path / "warm.pt", {"x": Entry("x", (1,), "float32")}, fill)
    tracemalloc.start()
    try:
        write_torch(tmp_path / "a.pt", {"w": entry}, fill)
        write_safetensors(tmp_path / "a.safetensors", {"w": entry}, fill)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Two pieces of BLOCK float32 (1 MiB each) and their temporaries.
    assert peak < 8 << 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_tensors(layout: SynthLayout, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(synthesize(tmp_path / "tiny", "tiny", seed=5, layout=layout))
    assert checkpoint.kind == layout
    checkpoint.check()
    assert checkpoint.world.dit == tiny_config().dit and checkpoint.world.text == tiny_config().text
    assert checkpoint.world.vae.decoder_causal == (layout == "streaming")
    for name, tensor in (checkpoint.load_dit() | checkpoint.load_vae()).items():
        assert torch.equal(tensor, torch.from_numpy(synth_tensor(name, tuple(tensor.shape), 5))), name


def test_other_libraries_read_it(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "tiny", "tiny", layout="diffusers")
    checkpoint = open_checkpoint(root)
    transformer = SanaWMTransformer3DModel.from_pretrained(root / "transformer")
    state = transformer.state_dict()
    official = checkpoint.load_dit()
    assert {to_diffusers(name) for name in official} == set(state)
    assert all(torch.equal(state[to_diffusers(name)], tensor) for name, tensor in official.items())

    vae, loading = AutoencoderKLLTX2Video.from_pretrained(root / "vae", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not vae.config.decoder_causal
    text: Any = Gemma2ForCausalLM.from_pretrained(root / "text_encoder", output_loading_info=True)
    loading = text[1]
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("a path")["input_ids"][0] == 2 and tokenizer.padding_side == "right"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_tokenizer_round_trip(text: str) -> None:
    encoded = TOKENIZER.encode(text)
    assert max(encoded.ids) < 512
    assert TOKENIZER.decode(encoded.ids) == text


TOKENIZER = build_tokenizer(512)


def test_tokenizer_size() -> None:
    assert TOKENIZER.get_vocab_size() == 512
    assert build_tokenizer(300).get_vocab_size() == 300
    assert TOKENIZER.to_str() == build_tokenizer(256000).to_str(), "must be reproducible and no larger than it needs"
    with pytest.raises(CheckpointError, match="at least 260"):
        build_tokenizer(100)


def test_bfloat16_and_no_text(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(synthesize(tmp_path / "tiny", "tiny", dtype="bfloat16", text=False))
    assert checkpoint.text_dir is None and checkpoint.tokenizer_file is None
    assert {tensor.dtype for tensor in checkpoint.load_dit(names=["t_block.1.bias"]).values()} == {torch.bfloat16}
    want = torch.from_numpy(synth_tensor("t_block.1.bias", (768,), 0)).bfloat16()
    assert torch.equal(checkpoint.load_dit(torch.float32, ["t_block.1.bias"])["t_block.1.bias"], want.float())


def test_random_weights_never_carry_the_official_name(tmp_path: Path) -> None:
    from dataclasses import replace

    root = synthesize(tmp_path / "x", replace(tiny_config(), name="sana-wm"), text=False)
    assert open_checkpoint(root).world.name == "sana-wm-random"


def test_progress_and_interruption(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    synthesize(tmp_path / "done", "tiny", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done) and calls[-1][1] == calls[-1][2]

    def interrupt(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "cut", "tiny", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["done"]

    before = open_checkpoint(tmp_path / "done").fingerprint()
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "done", "tiny", seed=1, overwrite=True, progress=interrupt)
    assert open_checkpoint(tmp_path / "done").fingerprint() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["done"]


def test_existing_paths(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "a" / "tiny", "tiny", text=False)
    first = open_checkpoint(root).fingerprint()
    with pytest.raises(CheckpointError, match="already exists"):
        synthesize(root, "tiny")
    assert open_checkpoint(root).fingerprint() == first
    synthesize(root, "tiny", text=False, overwrite=True)
    assert open_checkpoint(root).fingerprint() == first, "same seed, same bytes"
    synthesize(root, "tiny", text=False, overwrite=True, seed=1)
    assert open_checkpoint(root).fingerprint() != first
    assert [entry.name for entry in root.parent.iterdir()] == ["tiny"]
    (tmp_path / "empty").mkdir()
    synthesize(tmp_path / "empty", "tiny", text=False)


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB .* 0\.0 GB free"):
        synthesize(tmp_path / "tiny", "tiny")
    assert not list(tmp_path.iterdir())


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="streaming, bidirectional, diffusers"):
        synthesize(tmp_path / "tiny", "tiny", layout="gguf")  # type: ignore[arg-type]

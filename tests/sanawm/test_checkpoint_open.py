"""Opening checkpoints: the official configuration, where the prefix comes from, and what is read lazily."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config

from sanawm.config import DiTConfig, TextConfig, VAEConfig, WorldConfig, tiny_config
from sanawm.errors import CheckpointError, UserError
from sanawm.keys import dit_tensors, to_official
from sanawm.model.checkpoint import metadata, open_checkpoint
from sanawm.model.checkpoint.synth import synth_tensor, synthesize
from sanawm.model.checkpoint.writers import Entry, write_torch


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("open") / "streaming", "tiny")


@pytest.fixture
def bidirectional(tmp_path: Path) -> Path:
    return synthesize(tmp_path / "bidirectional", "tiny", layout="bidirectional")


def official(folder: Path, chi: list[str] | None = None, file: str = "dit/sana_wm_1600m_720p.safetensors", **text: object) -> Path:
    """A checkpoint of the official names and shapes; its 5 GB of zeros are a hole in the file."""
    header, offset = {}, 0
    for name, info in dit_tensors(DiTConfig()).items():
        header[name] = {"dtype": "BF16", "shape": info.shape, "data_offsets": [offset, offset + 2 * info.numel]}
        offset += 2 * info.numel
    head = json.dumps(header).encode()
    (folder / file).parent.mkdir(parents=True)
    with open(folder / file, "wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        stream.truncate(8 + len(head) + offset)
    section = {"chi_prompt": list(DEFAULT_CHI_PROMPT) if chi is None else chi, **text}
    (folder / "config.yaml").write_text(yaml.safe_dump({"text_encoder": section}))
    return folder


def test_official_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(official(tmp_path))
    assert checkpoint.kind == "bidirectional" and checkpoint.commit is None
    assert checkpoint.world == WorldConfig(vae=VAEConfig(decoder_causal=False))
    assert len(checkpoint.chi_prompt) == 1057 and checkpoint.chi_prompt.endswith("User Prompt: ")
    checkpoint.check()
    with pytest.raises(CheckpointError, match="--vae"):
        checkpoint.load_vae()


def test_chunk_causal_checkpoint(tmp_path: Path) -> None:
    assert open_checkpoint(official(tmp_path, file="dit/sana_wm_chunk_causal_1600m_720p.safetensors")).kind == "chunk_causal"


def test_text_tokens_of_the_config_are_used(tmp_path: Path) -> None:
    assert open_checkpoint(official(tmp_path, model_max_length=512)).world.dit.text_tokens == 512


def test_official_prefix_must_be_the_released_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(official(tmp_path, [*DEFAULT_CHI_PROMPT[:-1], "User prompt: "]))
    with pytest.raises(CheckpointError, match=r"SHA-256 \w{12}…, expected 62b9ab89eebb… of the released one"):
        checkpoint.chi_prompt  # noqa: B018


def test_prefix_without_a_config_file_is_the_released_one(tmp_path: Path) -> None:
    root = official(tmp_path)
    (root / "config.yaml").unlink()
    assert open_checkpoint(root).chi_prompt == "\n".join(DEFAULT_CHI_PROMPT)


def test_prefix_must_be_strings(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(official(tmp_path, [1, 2]))  # type: ignore[list-item]
    with pytest.raises(CheckpointError, match=r"no list of strings text_encoder\.chi_prompt"):
        checkpoint.chi_prompt  # noqa: B018


def test_parts(streaming: Path) -> None:
    checkpoint = open_checkpoint(streaming)
    assert checkpoint.world == tiny_config()
    assert set(checkpoint.load_dit()) == set(dit_tensors(tiny_config().dit))
    statistics = {"latents_mean", "latents_std"}
    encoder, decoder, both = checkpoint.load_vae("encoder"), checkpoint.load_vae("decoder"), checkpoint.load_vae()
    assert set(encoder) & set(decoder) == statistics and set(encoder) | set(decoder) == set(both)
    assert all(name.startswith("encoder.") for name in set(encoder) - statistics)
    assert all(name.startswith("decoder.") for name in set(decoder) - statistics)
    assert set(checkpoint.part_files()) == {"dit", "vae", "text_encoder", "config"}
    assert checkpoint.tokenizer_file == streaming / "text_encoder" / "tokenizer.json"
    assert {t.dtype for t in checkpoint.load_dit(torch.bfloat16).values()} == {torch.bfloat16}
    assert {t.dtype for t in checkpoint.load_vae(dtype=torch.float16).values()} == {torch.float16}
    assert list(checkpoint.load_dit(names=["t_block.1.bias"])) == ["t_block.1.bias"]
    with pytest.raises(KeyError):
        checkpoint.load_dit(names=["nothing"])


def test_critic_is_ignored_and_never_read(tmp_path: Path) -> None:
    table = dit_tensors(tiny_config().dit)
    shape, file = (64, 1024, 128), tmp_path / "model.pt"  # 32 MiB each

    def fill(entry: Entry):  # type: ignore[no-untyped-def]
        yield synth_tensor(entry.key, entry.shape, 0).data.cast("B")

    state = {
        "critic": {f"model.{name}": Entry("critic/" + name, info.shape, "float32") for name, info in table.items()},
        "optimizer": {i: {"exp_avg": Entry(f"moment{i}.x", shape, "float32")} for i in range(2)},
        "generator": {f"model.{name}": Entry(name, info.shape, "float32") for name, info in table.items()},
    }
    write_torch(file, state, fill)
    weights = open_checkpoint(file).load_dit()
    for name, tensor in weights.items():
        assert torch.equal(tensor, torch.from_numpy(synth_tensor(name, tuple(tensor.shape), 0)))
    size = resident = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith(("Size:", "Rss:")):
            kib = int(line.split()[1])
            size, resident = size + kib * line.startswith("Size:"), resident + kib * line.startswith("Rss:")
    # Mapped as a whole, but in memory are the generator (8 MB) and the pages around it only.
    assert size > 64 * 1024 and 0 < resident < 24 * 1024


@pytest.mark.parametrize("container", ["generator", "state_dict", None])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, streaming: Path, container: str | None, prefix: str, zipped: bool) -> None:
    weights = open_checkpoint(streaming).load_dit()
    state = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({container: state} if container else state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(tmp_path / "a.pt").load_dit()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_buffers_that_a_file_omits_are_zero(tmp_path: Path, streaming: Path) -> None:
    weights = open_checkpoint(streaming).load_dit()
    save_file({name: t for name, t in weights.items() if "recall_gate" not in name}, tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors").load_dit(torch.bfloat16)
    assert list(found) == list(weights)
    assert torch.equal(found["blocks.0.attn.recall_gate"], torch.zeros(1, dtype=torch.bfloat16))


def test_single_file_has_no_world(bidirectional: Path) -> None:
    checkpoint = open_checkpoint(bidirectional / "dit" / "sana_wm_1600m_720p.safetensors")
    assert checkpoint.kind == "file" and checkpoint.dit_config.hidden == tiny_config().dit.hidden
    assert len(checkpoint.load_dit()) == 190
    with pytest.raises(CheckpointError, match="add a `sanawm:` section"):
        checkpoint.world  # noqa: B018


def test_shards(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "tiny", "tiny", layout="diffusers")
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:100], "model-00002-of-00002.safetensors": names[100:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, file.with_name(shard))
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    found = open_checkpoint(root).load_dit()
    assert all(torch.equal(found[to_official(name)], tensor) for name, tensor in weights.items())

    file.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: model-00002-of-00002\.safetensors"):
        open_checkpoint(root).load_dit()


def test_text_encoder_and_vae_from_elsewhere(tmp_path: Path, streaming: Path) -> None:
    bare = synthesize(tmp_path / "bare", "tiny", text=False)
    for text in (streaming / "text_encoder", streaming):
        checkpoint = open_checkpoint(bare, text_encoder=text)
        assert checkpoint.text_dir == streaming / "text_encoder"
        assert checkpoint.tokenizer_file == streaming / "text_encoder" / "tokenizer.json"
        checkpoint.check()
    file = bare / "sana_dit" / "model.pt"
    for vae in (streaming / "ltx2_causal_vae", streaming):
        assert len(open_checkpoint(file, vae=vae).load_vae("decoder")) > 2
    with pytest.raises(CheckpointError, match="expected a Gemma-2 folder"):
        open_checkpoint(bare, text_encoder=tmp_path)
    with pytest.raises(CheckpointError, match="expected an LTX-2 VAE folder"):
        open_checkpoint(bare, vae=tmp_path)


def test_text_encoder_of_another_size(tmp_path: Path) -> None:
    root = official(tmp_path / "official")
    (tmp_path / "text").mkdir()
    config = {"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(UserError, match="captions of width 2304 and the text encoder makes 64"):
        open_checkpoint(root, text_encoder=tmp_path / "text").world  # noqa: B018


def test_fingerprint(bidirectional: Path, tmp_path: Path) -> None:
    first = open_checkpoint(bidirectional).fingerprint()
    moved = bidirectional.rename(tmp_path / "elsewhere")
    assert open_checkpoint(moved).fingerprint() == first, "the place does not matter"
    for name in ("dit/sana_wm_1600m_720p.safetensors", "vae/config.json", "text_encoder/tokenizer.json", "config.yaml"):
        content = bytearray((moved / name).read_bytes())
        content[-3] ^= 1
        (moved / name).write_bytes(content)
        changed = open_checkpoint(moved).fingerprint()
        assert changed != first, name
        first = changed


@pytest.mark.parametrize("world", [WorldConfig(), tiny_config()])
def test_configuration_files_round_trip(world: WorldConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(metadata.vae_config_json(world.vae)))
    assert metadata.read_vae_config(tmp_path) == world.vae
    file.write_text(json.dumps(metadata.text_config_json(world.text)))
    assert metadata.read_text_config(tmp_path) == world.text


def test_configuration_files_of_the_libraries(tmp_path: Path) -> None:
    """diffusers' and transformers' own defaults are the official sizes."""
    with torch.device("meta"):
        vae: Any = AutoencoderKLLTX2Video(decoder_causal=False)
    vae.save_config(tmp_path)
    assert metadata.read_vae_config(tmp_path) == VAEConfig(decoder_causal=False)
    Gemma2Config().save_pretrained(tmp_path)
    assert metadata.read_text_config(tmp_path) == TextConfig()

"""Tensor tables against the public model classes, and configurations inferred from names and shapes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, SanaWMTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2Model

from sanawm.config import DiTConfig, TextConfig, VAEConfig, tiny_config
from sanawm.errors import CheckpointError, UserError
from sanawm.keys import (
    difference,
    dit_tensors,
    fit_dit_config,
    infer_dit_config,
    parameters,
    stored_prefix,
    text_tensors,
    to_diffusers,
    to_official,
    vae_tensors,
)

configs = st.builds(
    lambda heads, head_dim, **rest: DiTConfig(hidden=heads * head_dim, head_dim=head_dim, cross_heads=heads, **rest),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24, 32, 112]),
    depth=st.integers(1, 6),
    softmax_every=st.integers(1, 5),
    mlp_ratio=st.integers(1, 4),
    in_channels=st.integers(1, 9),
    caption_channels=st.integers(1, 40),
    plucker_channels=st.integers(1, 60),
    conv_kernel=st.integers(2, 5),
)


def shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in dit_tensors(config).items()}


def stored(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def diffusers_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = SanaWMTransformer3DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            hidden_size=config.hidden,
            num_attention_heads=config.cross_heads,
            linear_head_dim=config.head_dim,
            softmax_every_n=config.softmax_every,
            conv_kernel_size=config.conv_kernel,
            mlp_ratio=float(config.mlp_ratio),
            caption_channels=config.caption_channels,
            chunk_plucker_channels=config.plucker_channels,
            chunk_plucker_post_attn_blocks=config.depth,
        )
    return stored(model)


def test_full_size_counts() -> None:
    table = dit_tensors(DiTConfig())
    assert parameters(table) == 2_661_800_448
    assert len(table) == 870
    assert sum(not info.buffer for info in table.values()) == 850
    assert sum(info.numel for info in vae_tensors(VAEConfig()).values()) == 1_222_479_857
    by_group: dict[str, int] = {}
    for info in table.values():
        if not info.buffer:
            by_group[info.group] = by_group.get(info.group, 0) + info.numel
    assert by_group["ffn"] == 1_207_180_800
    assert by_group["attention"] == 503_867_200
    assert by_group["camera"] == 401_811_200
    assert by_group["cross_attention"] == 401_676_800


def test_full_size_equals_diffusers() -> None:
    expected = diffusers_shapes(DiTConfig())
    assert {to_diffusers(name): shape for name, shape in shapes(DiTConfig()).items()} == expected
    assert {to_official(name) for name in expected} == set(shapes(DiTConfig()))


@settings(max_examples=15, deadline=None)
@given(configs)
def test_any_size_equals_diffusers(config: DiTConfig) -> None:
    assert {to_diffusers(name): shape for name, shape in shapes(config).items()} == diffusers_shapes(config)


@pytest.mark.parametrize("config", [VAEConfig(), tiny_config().vae])
def test_vae_equals_diffusers(config: VAEConfig) -> None:
    with torch.device("meta"):
        model = AutoencoderKLLTX2Video(
            latent_channels=config.latent_channels,
            block_out_channels=config.encoder_widths,
            layers_per_block=config.encoder_layers,
            decoder_block_out_channels=config.decoder_widths,
            decoder_layers_per_block=config.decoder_layers,
        )
    assert {name: info.shape for name, info in vae_tensors(config).items()} == stored(model)


def test_vae_widths_must_double() -> None:
    with pytest.raises(UserError, match="double"):
        vae_tensors(VAEConfig(decoder_widths=(256, 512, 768)))


@pytest.mark.parametrize("config", [TextConfig(), tiny_config().text])
def test_text_equals_transformers(config: TextConfig) -> None:
    with torch.device("meta"):
        model = Gemma2Model(
            Gemma2Config(
                vocab_size=config.vocab,
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
            )
        )
    assert {name: info.shape for name, info in text_tensors(config).items()} == stored(model)


def test_unused_tensors() -> None:
    table = dit_tensors(DiTConfig())
    unused = {name for name, info in table.items() if not info.used}
    assert "raymap_embedder.proj.weight" in unused
    assert "blocks.3.attn.A_log" in unused and "blocks.2.attn.A_log" not in unused
    # raymap 2, recall_gate 20, six gate tensors in each of five softmax blocks
    assert len(unused) == 52


@settings(max_examples=40, deadline=None)
@given(configs)
def test_inference_inverts_the_table(config: DiTConfig) -> None:
    found = infer_dit_config(shapes(config))
    # A period beyond the depth, and the kernel of convolutions that no block has, leave no trace in the names.
    assert shapes(found) == shapes(config)
    assert [found.is_softmax(i) for i in range(found.depth)] == [config.is_softmax(i) for i in range(config.depth)]
    same = ("hidden", "depth", "head_dim", "mlp_ratio", "in_channels", "caption_channels", "plucker_channels")
    assert all(getattr(found, field) == getattr(config, field) for field in same)


def test_official_size_is_inferred_as_the_default() -> None:
    assert infer_dit_config(shapes(DiTConfig())) == DiTConfig()


@settings(max_examples=40, deadline=None)
@given(configs.filter(lambda c: c.depth > 1), st.data())
def test_one_missing_tensor_is_named(config: DiTConfig, data: st.DataObject) -> None:
    # Without the last block's convolution a model cannot be told from one whose softmax blocks have another period.
    complete = shapes(config)
    removable = [
        name
        for name, info in dit_tensors(config).items()
        if not info.buffer and ".conv_k" not in name and not name.startswith(("plucker_embedder", "y_embedder"))
    ]
    name = data.draw(st.sampled_from(removable))
    without = {key: shape for key, shape in complete.items() if key != name}
    try:
        infer_dit_config(without)
    except CheckpointError as error:
        assert name in str(error)
    else:
        pytest.fail(f"{name} was not missed")


def test_missing_short_convolution_is_named() -> None:
    found = shapes(DiTConfig())
    del found["blocks.5.attn.conv_k.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.5\.attn\.conv_k\.weight") as info:
        infer_dit_config(found)
    assert "expected 870 tensors, found 869" in str(info.value)
    assert fit_dit_config(found) == DiTConfig()


def test_report_groups_and_counts() -> None:
    found = shapes(tiny_config().dit)
    for index in range(4):
        for name in ("proj.weight", "proj.bias"):
            del found[f"blocks.{index}.attn.{name}"]
    found["blocks.0.lora.weight"] = (4, 4)
    found["t_block.1.bias"] = (7,)
    diff = difference(dit_tensors(tiny_config().dit), found)
    assert (len(diff.missing), len(diff.extra), len(diff.misshaped)) == (8, 1, 1)
    report = diff.report("file.pt", "Get another.")
    assert "8 missing: " in report and "3 more" in report
    assert "1 unexpected: blocks.0.lora.weight" in report
    assert "t_block.1.bias is 7, expected 768" in report
    assert report.endswith("Get another.")


def test_ignored_tensors_may_have_any_shape_and_buffers_may_be_absent() -> None:
    table = dit_tensors(tiny_config().dit)
    found = {name: info.shape for name, info in table.items() if not info.buffer}
    assert not difference(table, found | {"pos_embed": (1, 2, 3), "y_embedder.y_embedding": (5,)})
    assert len(difference(table, found, buffers_required=True)) == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": (3, 3)},
        {"a.attn.output_gate.weight": (64, 64), "a.attn.beta_proj.weight": (2, 64)},
        {"blocks.900000.attn.output_gate.weight": (64, 64), "blocks.0.attn.beta_proj.weight": (2, 64)},
        {"blocks.0.attn.output_gate.weight": (65, 65), "blocks.0.attn.beta_proj.weight": (2, 65)},
        {},
    ],
)
def test_other_models_are_refused(bad: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match="SANA-WM"):
        infer_dit_config(bad)


def test_head_dim_that_is_no_multiple_of_eight() -> None:
    good = shapes(DiTConfig(hidden=64, head_dim=32, cross_heads=2))
    found = {name: tuple(6 if n == 64 else n for n in shape) for name, shape in good.items()}
    with pytest.raises(CheckpointError, match="multiple of 8"):
        infer_dit_config(found)


@pytest.mark.parametrize("prefix", ["", "model.", "weights.", "module.model."])
def test_prefix(prefix: str) -> None:
    names = [prefix + name for name in shapes(tiny_config().dit)]
    assert stored_prefix(names) == prefix
    assert stored_prefix([name for name in names if "x_embedder" not in name]) == prefix


def test_two_transformers_in_one_file() -> None:
    with pytest.raises(CheckpointError, match=r"found 2 under 'ema\.', 'model\.'"):
        stored_prefix(["model.x_embedder.proj.weight", "ema.x_embedder.proj.weight"])


def test_tables_and_prompt_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import sanawm.keys, sanawm.prompt; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

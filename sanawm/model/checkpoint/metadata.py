"""What a checkpoint's configuration files say: config.yaml, and the VAE's and text encoder's config.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sanawm.config import TextConfig, VAEConfig, WorldConfig
from sanawm.errors import CheckpointError, UserError
from sanawm.model.checkpoint.lazy import require

OFFICIAL_NAME = "sana-wm"
# SHA-256 of the released prompt prefix, the eight strings of text_encoder.chi_prompt joined by newlines (1057 characters).
CHI_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"

# Settings of AutoencoderKLLTX2Video that the model definition takes as given; a file may leave them out.
_VAE_FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size_t": 1,
    "timestep_conditioning": False,
    "decoder_inject_noise": [False] * 4,
    "spatio_temporal_scaling": [True] * 4,
    "decoder_spatio_temporal_scaling": [True] * 3,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "upsample_type": ["spatiotemporal"] * 3,
    "upsample_residual": [True] * 3,
    "upsample_factor": [2, 2, 2],
    "encoder_causal": True,
    "encoder_spatial_padding_mode": "zeros",
    "decoder_spatial_padding_mode": "reflect",
    "scaling_factor": 1.0,
}
_VAE_FIELDS = {
    "latent_channels": "latent_channels",
    "patch_size": "patch",
    "block_out_channels": "encoder_widths",
    "layers_per_block": "encoder_layers",
    "decoder_block_out_channels": "decoder_widths",
    "decoder_layers_per_block": "decoder_layers",
    "decoder_causal": "decoder_causal",
}
_TEXT_FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read without constructing objects; CheckpointError if it is not one."""
    yaml = require("yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is not valid YAML ({str(error).splitlines()[0]}); download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a mapping; download it again")
    return data


def world_section(data: dict[str, Any], path: Path) -> WorldConfig | None:
    """The `sanawm:` section of a config.yaml, a WorldConfig, which checkpoints of other than the official size carry."""
    if "sanawm" not in data:
        return None
    try:
        return WorldConfig.from_json(data["sanawm"])
    except UserError as error:
        raise CheckpointError(f"{path}, section sanawm: {error}") from error


def chi_prompt(data: dict[str, Any], path: Path, *, official: bool) -> str:
    """The prompt prefix of a config.yaml, `text_encoder.chi_prompt` joined by newlines.

    Raises CheckpointError where it is missing or, in an official checkpoint, is not the text that SANA-WM was trained with.
    """
    section = data.get("text_encoder")
    strings = section.get("chi_prompt") if isinstance(section, dict) else None
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise CheckpointError(f"{path} has no list of strings text_encoder.chi_prompt; use the checkpoint's own config.yaml")
    return checked_chi("\n".join(strings), str(path), official=official)


def checked_chi(chi: str, where: str, *, official: bool) -> str:
    """`chi` itself if it is the released prefix or need not be; CheckpointError otherwise."""
    digest = hashlib.sha256(chi.encode()).hexdigest()
    if official and digest != CHI_SHA256:
        raise CheckpointError(
            f"{where}: the prompt prefix text_encoder.chi_prompt has SHA-256 {digest[:12]}…, expected {CHI_SHA256[:12]}… of the "
            "released one; use the checkpoint's own config.yaml"
        )
    return chi


def packaged_chi() -> str | None:
    """The released prompt prefix as diffusers carries it, checked; None without a diffusers that has SANA-WM."""
    try:
        from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT
    except ImportError:
        return None
    return checked_chi("\n".join(DEFAULT_CHI_PROMPT), "diffusers", official=True)


def read_vae_config(folder: Path) -> VAEConfig:
    """The VAEConfig of a diffusers VAE folder; CheckpointError for one of another architecture."""
    path = folder / "config.json"
    data = _read_json(path)
    for name, expected in _VAE_FIXED.items():
        if name in data and data[name] != expected:
            raise CheckpointError(f"{path}: {name} is {data[name]}, expected {expected}; use the LTX-2 VAE of a SANA-WM checkpoint")
    return VAEConfig(**_fields(data, _VAE_FIELDS, path))


def vae_config_json(config: VAEConfig) -> dict[str, Any]:
    """config.json of a VAE folder as diffusers writes it."""
    values = {name: getattr(config, field) for name, field in _VAE_FIELDS.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"_class_name": "AutoencoderKLLTX2Video", **_VAE_FIXED, **plain}


def read_text_config(folder: Path) -> TextConfig:
    """The TextConfig of a Gemma-2 folder; CheckpointError for another model."""
    path = folder / "config.json"
    data = _read_json(path)
    if data.get("model_type") != "gemma2":
        raise CheckpointError(f"{path}: model_type is {data.get('model_type')}, expected gemma2; stage 1 of SANA-WM uses gemma-2-2b-it")
    return TextConfig(**_fields(data, _TEXT_FIELDS, path))


def text_config_json(config: TextConfig) -> dict[str, Any]:
    """config.json of a Gemma-2 folder as transformers writes it."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **{name: getattr(config, field) for name, field in _TEXT_FIELDS.items()},
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _fields(data: dict[str, Any], fields: dict[str, str], path: Path) -> dict[str, Any]:
    values = {field: data[name] for name, field in fields.items() if name in data}
    for field, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, (int, bool)) for part in parts):
            raise CheckpointError(f"{path}: {field} is {value!r}, expected whole numbers; download it again")
    return {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected an object; download it again")
    return data

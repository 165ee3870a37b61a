"""Configuration of the world model as frozen dataclasses, with the official sizes as defaults and a tiny preset for tests."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sanawm.errors import UserError

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DiTConfig:
    """The 2.6B diffusion transformer.

    The last group of fields are the points on which public implementations differ; each default follows the current official code.
    """

    in_channels: int = 128
    hidden: int = 2240
    depth: int = 20
    head_dim: int = 112
    cross_heads: int = 20
    softmax_every: int = 4
    mlp_ratio: int = 3
    caption_channels: int = 2304
    text_tokens: int = 300
    plucker_channels: int = 48
    conv_kernel: int = 4
    rope_theta: float = 10000.0
    rope_frames: int = 1024
    # Latent grid the key scale and the static graphs are made for.
    height: int = 22
    width: int = 40
    # Clamp the RMS of UCPE-transformed q, k, v to that before the transform (diffusers, sglang); the official code does not.
    rms_clamp: bool = False
    # Softmax attention scales; None is 1/sqrt(head_dim). sglang's streaming path uses the padded width, 1/sqrt(128).
    main_softmax_scale: float | None = None
    camera_softmax_scale: float | None = None
    # Carry the camera short convolution's left context across chunks (official since July 2026); sglang starts each chunk at zero.
    camera_conv_tail: bool = True
    # dtype in which the bidirectional sampler compares its condition mask; bfloat16 reproduces the bug that skips two of sixty steps.
    condition_mask_dtype: Dtype = "float32"
    # dtype of the ray matrices' geometry; public pipelines use bfloat16, float32 is more accurate over long paths.
    ray_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.hidden % self.head_dim or self.head_dim % 8 or self.hidden % self.cross_heads:
            raise UserError(
                f"hidden width {self.hidden} must be a multiple of head_dim {self.head_dim} and of cross_heads {self.cross_heads}, "
                "and head_dim a multiple of 8; correct the model configuration"
            )

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def glu_width(self) -> int:
        return self.hidden * self.mlp_ratio

    @property
    def key_scale(self) -> float:
        """Factor on GDN keys, (head_dim * tokens_per_frame) ** -0.5."""
        return (self.head_dim * self.tokens_per_frame) ** -0.5

    @property
    def main_scale(self) -> float:
        return self.main_softmax_scale if self.main_softmax_scale is not None else 1 / math.sqrt(self.head_dim)

    @property
    def camera_scale(self) -> float:
        return self.camera_softmax_scale if self.camera_softmax_scale is not None else 1 / math.sqrt(self.head_dim)

    def is_softmax(self, block: int) -> bool:
        return (block + 1) % self.softmax_every == 0

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Rotary pairs of a head for time, rows and columns: (20, 18, 18) at head_dim 112."""
        side = self.head_dim // 6
        return self.head_dim // 2 - 2 * side, side, side

    @property
    def camera_rope_pairs(self) -> tuple[int, int, int]:
        """Rotary pairs of the second half of a head in the camera branch: (10, 9, 9) at head_dim 112."""
        half = self.head_dim // 2
        side = half // 6
        return half // 2 - 2 * side, side, side


@dataclass(frozen=True)
class VAEConfig:
    """LTX-2 video VAE; strides (8, 32, 32)."""

    latent_channels: int = 128
    patch: int = 4
    encoder_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    encoder_layers: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_widths: tuple[int, ...] = (256, 512, 1024)
    decoder_layers: tuple[int, ...] = (5, 5, 5, 5)
    decoder_causal: bool = True

    @property
    def spatial_stride(self) -> int:
        return self.patch * 8

    temporal_stride: int = 8


@dataclass(frozen=True)
class TextConfig:
    """Gemma-2 text encoder (2b-it)."""

    vocab: int = 256000
    hidden: int = 2304
    intermediate: int = 9216
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: int = 256


@dataclass(frozen=True)
class StreamConfig:
    """Distilled self-forcing schedule."""

    chunk_frames: int = 3
    # Integers the model embeds, and the flow times of the Euler steps. Kept apart: 0.96 * 1000 is not exactly 960 in floating point.
    timesteps: tuple[int, ...] = (1000, 960, 889, 727)
    sigmas: tuple[float, ...] = (1.0, 0.96, 0.889, 0.727, 0.0)
    cached_chunks: int = 2
    sink: bool = True
    fps: int = 16

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise UserError(
                f"the sampler needs one flow time more than timesteps, found {len(self.sigmas)} and {len(self.timesteps)}; correct the configuration"
            )
        # The chunk before is always read: its scan state and convolution tails go on, whatever the attention window.
        if self.chunk_frames < 1 or 0 <= self.cached_chunks < 1 + self.sink:
            raise UserError(
                f"the sampler needs chunks of at least one frame and a window with the chunk before, found chunk_frames {self.chunk_frames}, "
                f"cached_chunks {self.cached_chunks}, sink {self.sink}; correct the configuration"
            )


@dataclass(frozen=True)
class WorldConfig:
    """Everything a bundle needs to know about the model."""

    name: str = "sana-wm"
    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)

    def __post_init__(self) -> None:
        if self.dit.in_channels != self.vae.latent_channels:
            made = f"the VAE makes {self.vae.latent_channels}"
            raise UserError(f"the DiT takes {self.dit.in_channels} latent channels and {made}; use a matching pair")
        if self.dit.caption_channels != self.text.hidden:
            made = f"the text encoder makes {self.text.hidden}"
            raise UserError(f"the DiT takes captions of width {self.dit.caption_channels} and {made}; use a matching pair")

    @property
    def image_height(self) -> int:
        return self.dit.height * self.vae.spatial_stride

    @property
    def image_width(self) -> int:
        return self.dit.width * self.vae.spatial_stride

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorldConfig:
        """Build from `to_json`'s output; unknown or missing fields raise UserError."""
        return _build(cls, data, "config")


_NESTED = {"dit": DiTConfig, "vae": VAEConfig, "text": TextConfig, "stream": StreamConfig}


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {type(data).__name__}; the file was not written by this version")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise UserError(f"{where}: unknown fields {', '.join(unknown)}; the file was written by another version")
    if missing := sorted(known - set(data)):
        raise UserError(f"{where}: fields {', '.join(missing)} are missing; the file was written by another version")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in _NESTED and cls is WorldConfig:
            values[name] = _build(_NESTED[name], value, f"{where}.{name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}; the file was written by another version") from error


def tiny_config() -> WorldConfig:
    """A world small enough for a laptop's CPU: 192x320 pixels, three GDN blocks and one softmax block, every mechanism of the full model."""
    return WorldConfig(
        name="tiny",
        dit=DiTConfig(in_channels=24, hidden=128, depth=4, head_dim=32, cross_heads=4, caption_channels=64, text_tokens=512, height=6, width=10),
        vae=VAEConfig(
            latent_channels=24,
            encoder_widths=(24, 48, 64, 64),
            encoder_layers=(1, 1, 1, 1, 1),
            decoder_widths=(24, 48, 96),
            decoder_layers=(1, 1, 1, 1),
        ),
        text=TextConfig(vocab=512, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, query_pre_attn_scalar=16),
    )


PRESETS = {"tiny": tiny_config, "full": WorldConfig}


def preset(name: str) -> WorldConfig:
    """The configuration of a named preset (`tiny` or `full`)."""
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()

"""SANA-WM's diffusion transformer.

Shapes: B batch, T latent frames, h, w latent grid, S = h*w tokens a frame, N = T*S tokens (frame-major), C channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sanawm.config import DiTConfig
from sanawm.model.dit.attention import CrossAttention, GDNAttention, SoftmaxAttention
from sanawm.model.dit.features import CameraFeatures, TextFeatures, ray_matrices, rope_tables
from sanawm.model.dit.ffn import GLUMBConvTemp
from sanawm.model.dit.layers import CaptionEmbedder, FinalLayer, NormWeight, PatchEmbed, TimestepEmbedder, gated_residual, modulate
from sanawm.model.dit.state import BlockState, ChunkState
from sanawm_kernels.numerics import rms_norm

CAPTION_NORM_EPS = 1e-5


class Block(nn.Module):
    """Self-attention, Plücker injection, cross-attention, FFN."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        C = config.hidden
        self.grid = (config.height, config.width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, C))
        self.attn: GDNAttention | SoftmaxAttention = SoftmaxAttention(config) if config.is_softmax(index) else GDNAttention(config)
        self.plucker_proj = nn.Linear(C, C)
        self.cross_attn = CrossAttention(config)
        self.mlp = GLUMBConvTemp(config)

    def forward(
        self,
        x: Tensor,
        modulation_BT6C: Tensor,
        camera: CameraFeatures,
        plucker: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        chunks: Sequence[int],
        past: Sequence[BlockState],
        tail_only: bool,
    ) -> tuple[Tensor, BlockState]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation_BT6C).unbind(2)
        attention, fields = self.attn(modulate(x, shift1, scale1), camera, chunks, past)
        x = gated_residual(x, gate1, attention)
        x = x + plucker
        x = x + self.cross_attn(x, *text)
        tail = past[-1].ffn_tail if past else None
        update, ffn_tail = self.mlp(modulate(x, shift2, scale2), self.grid, chunks, tail, tail_only=tail_only)
        if update is not None:
            x = gated_residual(x, gate2, update)
        return x, BlockState(ffn_tail=ffn_tail, **fields)


class SanaWM(nn.Module):
    """The transformer under the official parameter names (SANA-WM paper, arXiv 2605.15178).

    One definition serves three schedules. Dense (bidirectional): the whole clip as one chunk. Block-causal: `chunks` with several entries.
    Streaming: one chunk at a time with `past`, the states of the chunks in the attention window, oldest first; the last entry must be the
    chunk right before this one.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        C = config.hidden
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, C)
        self.plucker_embedder = PatchEmbed(config.plucker_channels, C)
        # Present in checkpoints and never evaluated with chunk-wise Plücker conditioning.
        self.raymap_embedder = PatchEmbed(3, C)
        self.t_embedder = TimestepEmbedder(C)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.y_embedder = CaptionEmbedder(config.caption_channels, C)
        self.attention_y_norm = NormWeight(C)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, i) for i in range(config.depth))  # type: ignore[assignment]
        self.final_layer = FinalLayer(C, config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.final_layer.linear.weight.dtype

    def encode_text(self, y_BLE: Tensor, mask_BL: Tensor) -> TextFeatures:
        """Text embedding (B, L, caption width) and mask (B, L) -> cross-attention keys and values of every block."""
        y = rms_norm(self.y_embedder(y_BLE.to(self.dtype)), self.attention_y_norm.weight, CAPTION_NORM_EPS).to(self.dtype)
        pairs = [block.cross_attn.keys_values(y) for block in self.blocks]
        return TextFeatures(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), mask_BL.bool())

    def encode_camera(self, camera_BT20: Tensor, plucker_B48Thw: Tensor, time_cos: Tensor, time_sin: Tensor) -> CameraFeatures:
        """Step-independent camera features of T frames.

        camera_conditions (B, T, 20) float32; chunk_plucker (B, 48, T, h, w); time_cos, time_sin (T, time pairs) of the absolute latent frame
        indices (`sanawm.camera.rope_time`).
        """
        h, w = plucker_B48Thw.shape[-2:]
        geometry = torch.promote_types(getattr(torch, self.config.ray_dtype), torch.bfloat16)
        if camera_BT20.dtype == torch.float64:
            geometry = torch.float64
        rays, inverse = ray_matrices(camera_BT20, h, w, geometry)
        cos, sin, cam_cos, cam_sin = rope_tables(self.config, time_cos, time_sin)
        p = self.plucker_embedder(plucker_B48Thw.to(self.dtype))
        return CameraFeatures(rays, inverse, cos, sin, cam_cos, cam_sin, tuple(block.plucker_proj(p) for block in self.blocks))

    def forward(
        self,
        latents_BCThw: Tensor,
        timestep_BT: Tensor,
        text: TextFeatures,
        camera: CameraFeatures,
        *,
        chunks: Sequence[int] | None = None,
        past: Sequence[ChunkState] = (),
        commit: bool = False,
    ) -> tuple[Tensor | None, ChunkState]:
        """One evaluation; returns (velocity (B, C_in, T, h, w), the state this chunk leaves).

        timestep (B, T) in [0, 1000], truncated to integers; `past` is read and never changed. With `commit` (the clean pass at t = 0) what
        only the velocity needs is not computed and the velocity is None.
        """
        B, _, T, h, w = latents_BCThw.shape
        if (h, w) != (self.config.height, self.config.width):
            raise ValueError(f"expected a latent grid of {self.config.height}x{self.config.width}, found {h}x{w}")
        chunks = (T,) if chunks is None else tuple(chunks)
        if sum(chunks) != T:
            raise ValueError(f"chunks {chunks} must sum to the {T} frames given")
        x = self.x_embedder(latents_BCThw.to(self.dtype))
        t_BTC = self.t_embedder(timestep_BT)
        modulation = self.t_block(t_BTC).unflatten(-1, (6, -1))
        states = []
        for i, block in enumerate(self.blocks):
            captions = (text.keys[i], text.values[i], text.mask)
            last = commit and i == len(self.blocks) - 1
            x, state = block(x, modulation, camera, camera.plucker[i], captions, chunks, [chunk[i] for chunk in past], last)
            states.append(state)
        if commit:
            return None, tuple(states)
        velocity = self.final_layer(x, t_BTC)
        return velocity.transpose(1, 2).reshape(B, -1, T, h, w), tuple(states)

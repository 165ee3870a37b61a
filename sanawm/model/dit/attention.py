"""Self-attention of both block kinds, each with its camera branch, and cross-attention.

Shapes: B batch, N tokens of the sequence or chunk, C channels, H heads, D head width, S tokens a frame, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm.config import DiTConfig
from sanawm.model.dit.features import CameraFeatures, attend
from sanawm.model.dit.layers import NormWeight
from sanawm.model.dit.state import BlockState
from sanawm_kernels import ops
from sanawm_kernels.gdn.naive import NORM_EPS, Gates
from sanawm_kernels.numerics import rms_norm, wide
from sanawm_kernels.rotary import rms_clamp, rotate_pairs

CROSS_NORM_EPS = 1e-6


class ShortConv(nn.Module):
    """Taps (C, 1, 4) of a depthwise convolution along time."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))


class SelfAttention(nn.Module):
    """What both block kinds share: projections, output gate, merge of the main and camera branches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        C, H = config.hidden, config.heads
        self.config = config
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_norm, self.k_norm = NormWeight(C), NormWeight(C)
        # The gate parameters are stored in softmax blocks too, where nothing reads them.
        self.beta_proj, self.gate_proj = nn.Linear(C, H), nn.Linear(C, H)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(H)), nn.Parameter(torch.empty(H))
        self.register_buffer("recall_gate", torch.zeros(1))
        self.output_gate, self.proj = nn.Linear(C, C), nn.Linear(C, C)
        self.q_proj_cam, self.k_proj_cam, self.v_proj_cam = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.q_norm_cam, self.k_norm_cam = NormWeight(C), NormWeight(C)
        self.out_proj_cam = nn.Linear(C, C)

    def merge(self, u: Tensor, main: Tensor, camera: Tensor) -> Tensor:
        """Sum of the branches, gated in wide precision, projected."""
        a = main + self.out_proj_cam(camera)
        gated = wide(a) * F.silu(wide(self.output_gate(u)))
        return self.proj(gated.to(u.dtype))


class GDNAttention(SelfAttention):
    """Gated delta network with a camera branch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.conv_k = ShortConv(config.hidden, config.conv_kernel)
        self.conv_k_cam = ShortConv(config.hidden, config.conv_kernel)

    def forward(
        self, u: Tensor, camera: CameraFeatures, chunks: Sequence[int], past: Sequence[BlockState]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u (B, N, C) -> (out (B, N, C), the GDN fields of the new BlockState); only the last entry of `past` is read."""
        config = self.config
        q, k, v = self.qkv(u).split(u.shape[-1], -1)
        gates = Gates(self.beta_proj(u), self.gate_proj(u), self.A_log, self.dt_bias)
        last = past[-1] if past else None
        common: dict[str, Any] = {"chunks": tuple(chunks), "key_scale": config.key_scale}
        main, s, z, k_tail = ops.main_gdn(
            q, k, v, gates, self.conv_k.weight.squeeze(1), self.q_norm.weight, self.k_norm.weight, camera.cos, camera.sin,
            state=None if last is None else (last.s, last.z, last.k_tail), **common,
        )  # fmt: skip
        carry = config.camera_conv_tail
        cam, s_cam, cam_tail = ops.camera_gdn(
            self.q_proj_cam(u), self.k_proj_cam(u), self.v_proj_cam(u), gates, self.conv_k_cam.weight.squeeze(1),
            self.q_norm_cam.weight, self.k_norm_cam.weight, camera.rays, camera.rays_inverse, camera.cam_cos, camera.cam_sin,
            clamp=config.rms_clamp, carry=carry, state=None if last is None else (last.s_cam, last.cam_tail), **common,
        )  # fmt: skip
        fields = {"s": s, "z": z, "s_cam": s_cam, "k_tail": k_tail}
        if carry:
            fields["cam_tail"] = cam_tail
        return self.merge(u, main, cam), fields


class SoftmaxAttention(SelfAttention):
    """Softmax attention with a camera branch, over [cached chunks | current tokens]."""

    def forward(
        self, u: Tensor, camera: CameraFeatures, chunks: Sequence[int], past: Sequence[BlockState]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u (B, N, C) -> (out (B, N, C), the softmax fields of the new BlockState)."""
        config = self.config
        B, N, C = u.shape
        H = config.heads
        q, k, v = self.qkv(u).split(C, -1)
        q, k = rms_norm(q, self.q_norm.weight, NORM_EPS), rms_norm(k, self.k_norm.weight, NORM_EPS)
        q, k = (rotate_pairs(x.unflatten(-1, (H, -1)), camera.cos, camera.sin).to(u.dtype) for x in (q, k))
        v = v.unflatten(-1, (H, -1))

        qn = rms_norm(self.q_proj_cam(u), self.q_norm_cam.weight, NORM_EPS).unflatten(-1, (H, -1))
        kn = rms_norm(self.k_proj_cam(u), self.k_norm_cam.weight, NORM_EPS).unflatten(-1, (H, -1))
        vn = wide(self.v_proj_cam(u)).unflatten(-1, (H, -1))
        cos, sin = camera.cam_cos, camera.cam_sin
        qc = ops.ucpe(qn, camera.rays.transpose(-1, -2), cos, sin)
        kc, vc = ops.ucpe(kn, camera.rays_inverse, cos, sin), ops.ucpe(vn, camera.rays_inverse, cos, sin)
        if config.rms_clamp:
            qc, kc, vc = rms_clamp(qc, qn), rms_clamp(kc, kn), rms_clamp(vc, vn)
        qc, kc, vc = (x.to(u.dtype) for x in (qc, kc, vc))

        fields = {"k": k, "v": v, "cam_k": kc, "cam_v": vc}
        keys = {name: torch.cat([getattr(p, name) for p in past] + [x], 1) if past else x for name, x in fields.items()}
        mask = _block_causal_mask(chunks, N, u.device) if len(chunks) > 1 else None
        main = attend(q, keys["k"], keys["v"], config.main_scale, mask)
        cam = attend(qc, keys["cam_k"], keys["cam_v"], config.camera_scale, mask)
        cam = ops.ucpe(wide(cam).unflatten(-1, (H, -1)), camera.rays, cos, -sin).flatten(-2).to(u.dtype)
        return self.merge(u, main, cam), fields


def _block_causal_mask(chunks: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """(N, N) bool, true where the key's chunk is not after the query's."""
    frames = torch.repeat_interleave(torch.arange(len(chunks), device=device), torch.tensor(chunks, device=device))
    chunk = frames.repeat_interleave(tokens // sum(chunks))
    return chunk[:, None] >= chunk[None, :]


class CrossAttention(nn.Module):
    """Attention of the raw residual stream to the caption."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        C = config.hidden
        self.heads = config.cross_heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.q_norm, self.k_norm = NormWeight(C), NormWeight(C)

    def keys_values(self, y_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Caption embedding -> keys and values (B, L, H, D), in y's dtype."""
        k, v = self.kv_linear(y_BLC).chunk(2, -1)
        k = rms_norm(k, self.k_norm.weight, CROSS_NORM_EPS).to(y_BLC.dtype)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x_BNC: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor) -> Tensor:
        q = rms_norm(self.q_linear(x_BNC), self.q_norm.weight, CROSS_NORM_EPS).to(x_BNC.dtype).unflatten(-1, (self.heads, -1))
        mask = mask_BL[:, None, None, :].expand(-1, -1, x_BNC.shape[1], -1)
        return self.proj(attend(q, keys, values, q.shape[-1] ** -0.5, mask))

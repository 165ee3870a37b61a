"""Inputs of the transformer that do not depend on the denoising step: camera and text features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm.camera.rope import rope_grid
from sanawm.config import DiTConfig


@dataclass(frozen=True)
class CameraFeatures:
    """Camera geometry and products of a chunk, computed once for all its denoising steps.

    rays, rays_inverse (B, N, 4, 4) in at least float32; cos, sin (N, D/2) of the rotary encoding and cam_cos, cam_sin (N, D/4) of the camera
    branch's; plucker: per block (B, N, C).
    """

    rays: Tensor
    rays_inverse: Tensor
    cos: Tensor
    sin: Tensor
    cam_cos: Tensor
    cam_sin: Tensor
    plucker: tuple[Tensor, ...]


@dataclass(frozen=True)
class TextFeatures:
    """Cross-attention keys and values of a prompt, computed once a prompt.

    keys, values: per block (B, L, H, D); mask (B, L) bool, true on real tokens.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def ray_matrices(camera_BT20: Tensor, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """World-to-ray matrices of every token and their inverses, (B, T*h*w, 4, 4) each.

    camera_conditions (B, T, 20) = [camera-to-world (16, row-major), fx, fy, cx, cy at latent resolution]. Geometry is computed in `dtype`
    and returned in at least float32. A ray that is not finite gets the identity.
    """
    camera = camera_BT20.to(dtype)
    B, T, _ = camera.shape
    pose = camera[..., :16].reshape(B, T, 1, 4, 4)
    fx, fy, cx, cy = (camera[..., 16 + i][..., None] for i in range(4))
    rows = torch.arange(height, dtype=dtype, device=camera.device).repeat_interleave(width)
    columns = torch.arange(width, dtype=dtype, device=camera.device).repeat(height)
    x, y = (columns - cx) / fx, (rows - cy) / fy
    local = _unit(torch.stack((x, y, torch.ones_like(x)), -1))
    rotation, origin = pose[..., :3, :3], pose[..., :3, 3:]
    z = _unit((rotation @ local.unsqueeze(-1)).squeeze(-1))
    down = rotation[..., 1].expand_as(z)
    x_axis = _unit(torch.linalg.cross(down, z))
    y_axis = _unit(torch.linalg.cross(z, x_axis))
    basis = torch.stack((x_axis, y_axis, z), -2)
    offset = -(basis @ origin)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype, device=camera.device).expand(B, T, height * width, 1, 4)
    rays = torch.cat((torch.cat((basis, offset), -1), bottom), -2)
    transposed = basis.transpose(-1, -2)
    inverse = torch.cat((torch.cat((transposed, -(transposed @ offset)), -1), bottom), -2)
    identity = torch.eye(4, dtype=dtype, device=camera.device)
    # nan != nan: a test that every backend has.
    bad = (z != z).any(-1)[..., None, None]
    out_dtype = torch.promote_types(dtype, torch.float32)
    rays, inverse = (torch.where(bad, identity, m).flatten(1, 2).to(out_dtype) for m in (rays, inverse))
    return rays, inverse


def rope_tables(config: DiTConfig, time_cos: Tensor, time_sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary tables of a chunk's tokens from its frames' time tables.

    time_cos, time_sin (T, time pairs). Returns cos, sin (N, D/2) and the camera branch's (N, D/4): the first frequencies of each axis,
    sliced from the main table.
    """
    T, height, width = time_cos.shape[0], config.height, config.width
    pairs, cam_pairs = config.rope_pairs, config.camera_rope_pairs

    def spread(time: Tensor, rows: Tensor, columns: Tensor, keep: tuple[int, int, int]) -> Tensor:
        parts = (
            time[:, None, None, : keep[0]].expand(T, height, width, -1),
            rows[None, :, None, : keep[1]].expand(T, height, width, -1),
            columns[None, None, :, : keep[2]].expand(T, height, width, -1),
        )
        return torch.cat(parts, -1).flatten(0, 2)

    row_table, column_table = rope_grid(config)
    row_cos, row_sin = (torch.from_numpy(t).to(time_cos) for t in row_table)
    column_cos, column_sin = (torch.from_numpy(t).to(time_cos) for t in column_table)
    return (
        spread(time_cos, row_cos, column_cos, pairs),
        spread(time_sin, row_sin, column_sin, pairs),
        spread(time_cos, row_cos, column_cos, cam_pairs),
        spread(time_sin, row_sin, column_sin, cam_pairs),
    )


def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on token-major heads, (B, N, H, D) -> (B, N, H*D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)

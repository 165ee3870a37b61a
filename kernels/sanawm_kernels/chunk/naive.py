"""Plain torch definitions of the operations around the blocks.

Shapes: T latent frames, h, w latent grid, S = h*w, N = T*S tokens (frame-major), C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sanawm_kernels.numerics import wide

UNIT_FLOOR = 1e-6


def transpose(x_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """Channel-major to token-major or back, (R, C) -> (C, R) in `dtype`."""
    return torch.clone(x_RC.t().to(dtype), memory_format=torch.contiguous_format)


def modulation_rows(timestep_T: Tensor, steps_K: Tensor, table_KW: Tensor) -> Tensor:
    """Rows of a table made for the timesteps `steps`, one a frame, (T, W). A timestep that the table lacks gives a row of NaN.

    Timesteps are truncated to integers as in training (SANA-WM paper, arXiv 2605.15178).
    """
    match = torch.trunc(timestep_T)[:, None] == steps_K[None, :]
    rows = table_KW[match.to(torch.uint8).argmax(1)]
    return torch.where(match.any(1)[:, None], rows, torch.full_like(rows, torch.nan))


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(UNIT_FLOOR)


def ray_matrices(camera_T20: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """World-to-ray matrices of every token and their inverses, (N, 4, 4) each, in camera's dtype (at least float32).

    camera rows: camera-to-world (16, row-major), fx, fy, cx, cy at latent resolution. A ray that is not finite gets the identity.
    """
    camera = wide(camera_T20)
    T = camera.shape[0]
    pose = camera[:, :16].reshape(T, 1, 4, 4)
    fx, fy, cx, cy = (camera[:, 16 + i, None] for i in range(4))
    rows = torch.arange(height, dtype=camera.dtype, device=camera.device).repeat_interleave(width)
    columns = torch.arange(width, dtype=camera.dtype, device=camera.device).repeat(height)
    x, y = (columns - cx) / fx, (rows - cy) / fy
    local = _unit(torch.stack((x, y, torch.ones_like(x)), -1))
    z = _unit((pose[..., :3, :3] @ local[..., None])[..., 0])
    x_axis = _unit(torch.linalg.cross(pose[..., :3, 1].expand_as(z), z))
    y_axis = _unit(torch.linalg.cross(z, x_axis))
    basis = torch.stack((x_axis, y_axis, z), -2)
    offset = -(basis @ pose[..., :3, 3:])
    identity = torch.eye(4, dtype=camera.dtype, device=camera.device)

    def whole(rotation: Tensor, translation: Tensor) -> Tensor:
        top = torch.cat((rotation, translation), -1)
        matrix = torch.cat((top, identity[3].expand(*top.shape[:2], 1, 4)), -2)
        return torch.where(z.isnan().any(-1)[..., None, None], identity, matrix).flatten(0, 1)

    transposed = basis.transpose(-1, -2)
    return whole(basis, offset), whole(transposed, -(transposed @ offset))


def rope_table(time_TP: Tensor, rows_hQ: Tensor, columns_wR: Tensor, keep: tuple[int, int, int]) -> Tensor:
    """Rotary table of every token, (N, sum(keep)): the first `keep` pairs of its frame's, row's and column's table."""
    T, height, width = time_TP.shape[0], rows_hQ.shape[0], columns_wR.shape[0]
    parts = (
        time_TP[:, None, None, : keep[0]].expand(T, height, width, -1),
        rows_hQ[None, :, None, : keep[1]].expand(T, height, width, -1),
        columns_wR[None, None, :, : keep[2]].expand(T, height, width, -1),
    )
    return torch.cat(parts, -1).flatten(0, 2)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh form, in x's dtype."""
    return torch.nn.functional.gelu(wide(x), approximate="tanh").to(x.dtype)


def euler_step(latents: Tensor, velocity: Tensor, size: float, keep_first: bool) -> Tensor:
    """latents (C, T, S) - size * velocity in `wide` precision, in the latents' dtype; with `keep_first` frame 0 stays bit-identical."""
    stepped = (wide(latents) - size * wide(velocity)).to(latents.dtype)
    if keep_first:
        stepped[:, 0] = latents[:, 0]
    return stepped

"""Inputs, state and outputs of the fused gated delta network.

Shapes: B batch, T frames, S tokens a frame, N = T*S tokens, C channels, H heads, D = C/H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MainBranch:
    """Inputs of the main branch: raw projections q, k, v (B, N, C); conv (C, 4); q_norm, k_norm (C,); cos, sin (N, D/2) float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    conv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class CameraBranch:
    """Inputs of the camera branch: raw projections q, k, v (B, N, C); conv (C, 4); q_norm, k_norm (C,); ray matrices (B or 1, N, 4, 4) and
    cos, sin (N, D/4), float32. clamp: the RMS-clamp variant. carry: the convolution reaches into the chunk before."""

    q: Tensor
    k: Tensor
    v: Tensor
    conv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    rays: Tensor
    rays_inverse: Tensor
    cos: Tensor
    sin: Tensor
    clamp: bool = False
    carry: bool = True


@dataclass(frozen=True)
class GDNState:
    """What a chunk leaves: s, s_cam (B, H, D, D) value x key and z (B, H, D), float32; k_tail, cam_tail (B, 3, S, C) in the projections' dtype.

    Fields of a branch that is not computed are None. `block_gdn` may write the state into the tensors it reads it from.
    """

    s: Tensor | None = None
    z: Tensor | None = None
    k_tail: Tensor | None = None
    s_cam: Tensor | None = None
    cam_tail: Tensor | None = None


@dataclass(frozen=True)
class BlockOutput:
    """Outputs (B, N, C) of the branches computed, and the new state (None in the read-only form)."""

    main: Tensor | None
    camera: Tensor | None
    state: GDNState | None

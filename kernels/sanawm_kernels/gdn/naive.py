"""Plain torch definition of the gated delta network.

Shapes: B batch, T frames, S tokens a frame, N = T*S tokens, C channels, H heads, D = C/H head width. `chunks` lists the frames of each chunk
and sums to T: the backward scan and the backward half of the short convolution never cross a chunk's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.numerics import rms_norm, wide
from sanawm_kernels.rotary import rms_clamp, rotate_pairs, ucpe

NORM_EPS = 1e-5
DENOMINATOR_EPS = 1e-8


@dataclass(frozen=True)
class Gates:
    """What decides how much a block writes and forgets.

    beta_logits, decay_logits (B, N, H), of each token; a frame decays by the mean of its tokens' logits. A_log, dt_bias (H,).
    """

    beta_logits: Tensor
    decay_logits: Tensor
    A_log: Tensor
    dt_bias: Tensor

    def beta(self) -> Tensor:
        """Write strength in (0, 1), (B, N, H), wide."""
        return torch.sigmoid(wide(self.beta_logits))

    def decay(self, frames: int) -> Tensor:
        """Factor on the state from one frame to the next, (B, frames, H) in (0, 1), wide."""
        logits = wide(self.decay_logits).unflatten(1, (frames, -1)).mean(2)
        return torch.exp(-torch.exp(wide(self.A_log)) * F.softplus(logits + wide(self.dt_bias)))


def short_conv(k_BTSC: Tensor, taps_CK: Tensor, chunks: Sequence[int], tail: Tensor | None, carry: bool = True) -> tuple[Tensor, Tensor]:
    """Symmetric depthwise convolution along time: taps w0 w1 w2 w3 w2 w1 w0 centred on the frame.

    The left half reaches into earlier chunks (`tail`: the last K-1 raw frames (B, K-1, S, C), zeros when None); the right half stops at the
    chunk's end. With `carry` false the left half starts at zero in every chunk. Returns the filtered keys (wide) and the new tail.
    """
    k, taps = wide(k_BTSC), wide(taps_CK)
    reach = taps.shape[-1] - 1
    B, T, S, C = k.shape
    raw = k_BTSC if tail is None else torch.cat((tail.to(k_BTSC.dtype), k_BTSC), 1)
    if raw.shape[1] < reach:
        raw = torch.cat((raw.new_zeros(B, reach - raw.shape[1], S, C), raw), 1)
    new_tail = raw[:, raw.shape[1] - reach :]

    out, start = [], 0
    for frames in chunks:
        own = k[:, start : start + frames]
        left = k.new_zeros(B, reach, S, C)
        if carry:
            before = k[:, max(start - reach, 0) : start]
            if tail is not None and before.shape[1] < reach:
                before = torch.cat((wide(tail).to(k.dtype), before), 1)[:, -reach:]
            left = torch.cat((left, before), 1)[:, -reach:]
        padded = torch.cat((left, own, k.new_zeros(B, reach, S, C)), 1)
        mixed = taps[:, reach] * own
        for j in range(1, reach + 1):
            mixed = mixed + taps[:, reach - j] * (padded[:, reach - j : reach - j + frames] + padded[:, reach + j : reach + j + frames])
        out.append(mixed)
        start += frames
    return torch.cat(out, 1) if len(out) > 1 else out[0], new_tail


def _delta_step(state: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """One frame's simultaneous delta update; state (B, H, Dv, Dk), k (B, H, S, Dk), v (B, H, S, Dv), beta (B, H, S, 1), decay (B, H, 1, 1)."""
    if state is None:
        return (v * beta).transpose(-1, -2) @ k
    kept = decay * state
    return kept + ((v - k @ kept.transpose(-1, -2)) * beta).transpose(-1, -2) @ k


def _scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chunks: Sequence[int], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward inclusive plus backward exclusive scan.

    q, k (B, H, T, S, Dk), v (B, H, T, S, Dv), beta (B, H, T, S, 1), decay (B, H, T, 1, 1). Returns (B, H, T, S, Dv) and the forward state
    after the last frame.
    """
    T = q.shape[2]
    frame = [(k[:, :, t], v[:, :, t], beta[:, :, t], decay[:, :, t]) for t in range(T)]
    out: list[Tensor] = []
    for t in range(T):
        state = _delta_step(state, *frame[t])
        out.append(q[:, :, t] @ state.transpose(-1, -2))
    start = 0
    for frames in chunks:
        later: Tensor | None = None
        for t in range(start + frames - 1, start, -1):
            later = _delta_step(later, *frame[t])
            out[t - 1] = out[t - 1] + q[:, :, t - 1] @ later.transpose(-1, -2)
        start += frames
    assert state is not None
    return torch.stack(out, 2), state


def _frames(x_BNX: Tensor, T: int, H: int) -> Tensor:
    """(B, T*S, H*D) -> (B, H, T, S, D)."""
    B, N, _ = x_BNX.shape
    return x_BNX.reshape(B, T, N // T, H, -1).permute(0, 3, 1, 2, 4)


def _tokens(x_BHTSD: Tensor) -> Tensor:
    """(B, H, T, S, D) -> (B, T*S, H*D)."""
    return x_BHTSD.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)


def main_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    conv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunks: Sequence[int],
    key_scale: float,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Main branch of a GDN block, from raw projections to its output.

    q, k, v (B, N, C) raw projections; conv (C, 4); q_norm, k_norm (C,); cos, sin (N, D/2).
    state: (S (B, H, D, D) value x key, z (B, H, D), tail (B, 3, S, C)) left by the chunk before, or None at the start.
    Returns (out (B, N, C) in q's dtype, S, z, tail). Keys and queries enter the numerator rotated and the denominator unrotated.
    """
    T, H = sum(chunks), gates.A_log.shape[0]
    B, N, C = q.shape
    S_in, z_in, tail_in = state if state is not None else (None, None, None)
    filtered, tail = short_conv(k.reshape(B, T, N // T, C), conv, chunks, tail_in)
    qn = torch.relu(rms_norm(q, q_norm, NORM_EPS))
    kn = torch.relu(rms_norm(filtered.reshape(B, N, C), k_norm, NORM_EPS)) * key_scale
    rotated_q = rotate_pairs(qn.unflatten(-1, (H, -1)), cos, sin).flatten(-2)
    rotated_k = rotate_pairs(kn.unflatten(-1, (H, -1)), cos, sin).flatten(-2)
    beta, decay = _frames(gates.beta(), T, H), gates.decay(T).permute(0, 2, 1)[..., None, None]

    numerator, S_out = _scan(_frames(rotated_q, T, H), _frames(rotated_k, T, H), _frames(wide(v), T, H), beta, decay, chunks, S_in)
    # The normaliser is the same scan with target value one and unrotated keys, carried as (B, H, 1, D).
    plain_k = _frames(kn, T, H)
    z_row = None if z_in is None else z_in.unsqueeze(-2)
    denominator, z_out = _scan(_frames(qn, T, H), plain_k, torch.ones_like(plain_k[..., :1]), beta, decay, chunks, z_row)
    out = _tokens(numerator / (denominator + DENOMINATOR_EPS))
    return out.to(q.dtype), S_out, z_out.squeeze(-2), tail


def camera_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    conv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rays: Tensor,
    rays_inverse: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunks: Sequence[int],
    key_scale: float,
    clamp: bool = False,
    carry: bool = True,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Camera branch of a GDN block: numerator only, on UCPE-transformed q, k, v, with the write strength corrected for key inflation.

    q, k, v (B, N, C) raw camera projections; rays, rays_inverse (B or 1, N, 4, 4); cos, sin (N, D/4).
    state: (S (B, H, D, D), tail (B, 3, S, C)) or None. Returns (out (B, N, C) in q's dtype, S, tail).
    """
    T, H = sum(chunks), gates.A_log.shape[0]
    B, N, C = q.shape
    S_in, tail_in = state if state is not None else (None, None)
    filtered, tail = short_conv(k.reshape(B, T, N // T, C), conv, chunks, tail_in, carry)
    qn = torch.relu(rms_norm(q, q_norm, NORM_EPS)).unflatten(-1, (H, -1))
    kn = (torch.relu(rms_norm(filtered.reshape(B, N, C), k_norm, NORM_EPS)) * key_scale).unflatten(-1, (H, -1))
    vn = wide(v).unflatten(-1, (H, -1))
    qt, kt, vt = ucpe(qn, rays.transpose(-1, -2), cos, sin), ucpe(kn, rays_inverse, cos, sin), ucpe(vn, rays_inverse, cos, sin)
    if clamp:
        qt, kt, vt = rms_clamp(qt, qn), rms_clamp(kt, kn), rms_clamp(vt, vn)
    inflation = kt.square().sum(-1).clamp_min(1e-12) / kn.square().sum(-1).clamp_min(1e-12)
    inflation = inflation.reshape(B, T, N // T, H).mean(2, keepdim=True).clamp_min(1.0)
    beta = (gates.beta().reshape(B, T, N // T, H) / inflation).reshape(B, N, H)
    decay = gates.decay(T).permute(0, 2, 1)[..., None, None]

    qf, kf, vf = (_frames(x.flatten(-2), T, H) for x in (qt, kt, vt))
    numerator, S_out = _scan(qf, kf, vf, _frames(beta, T, H), decay, chunks, S_in)
    out = ucpe(_tokens(numerator).unflatten(-1, (H, -1)), rays, cos, -sin).flatten(-2)
    return out.to(q.dtype), S_out, tail

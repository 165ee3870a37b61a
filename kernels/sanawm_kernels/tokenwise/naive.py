"""Plain torch definitions of the token-wise operations.

Shapes: B batch, T frames, S tokens a frame, N = T*S tokens, C channels, H heads, D = C/H head width, h, w latent grid, G width of the gated half.
Everything is computed in `wide` precision and rounded once to the input's dtype; quantized rows are made from the rounded values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels import numerics, rotary
from sanawm_kernels.numerics import wide
from sanawm_kernels.quant.request import Output, Quantize, quantize_rows

LAYER_NORM_EPS = 1e-6


def _per_frame(x_BNC: Tensor, T: int) -> Tensor:
    """(B, T*S, C) -> (B, T, S, C), wide."""
    return wide(x_BNC).unflatten(1, (T, -1))


def modulate(x_BNC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor, *, quantize: Quantize | None = None) -> Output:
    """LayerNorm without weights (eps 1e-6), then (1 + scale) * x + shift with one row a frame (SANA-WM paper, arXiv 2605.15178)."""
    normed = _per_frame(F.layer_norm(wide(x_BNC), x_BNC.shape[-1:], eps=LAYER_NORM_EPS), shift_BTC.shape[1])
    out = normed * (1 + wide(scale_BTC).unsqueeze(2)) + wide(shift_BTC).unsqueeze(2)
    return quantize_rows(out.flatten(1, 2).to(x_BNC.dtype), quantize)


def residual(
    x_BNC: Tensor,
    branch_BNC: Tensor | None = None,
    gate_BTC: Tensor | None = None,
    extra_BNC: Tensor | None = None,
    *,
    quantize: Quantize | None = None,
) -> Output:
    """x + gate * branch + extra: the gate has one row a frame (1 where it is None), `extra` is the Plücker product.

    The plain stream is always returned.
    """
    out = wide(x_BNC)
    if branch_BNC is not None:
        branch = wide(branch_BNC)
        if gate_BTC is not None:
            branch = (_per_frame(branch, gate_BTC.shape[1]) * wide(gate_BTC).unsqueeze(2)).flatten(1, 2)
        out = out + branch
    if extra_BNC is not None:
        out = out + wide(extra_BNC)
    stream = out.to(x_BNC.dtype)
    return Output(stream, quantize_rows(stream, quantize).quantized if quantize else None)


def residual_modulate(
    x_BNC: Tensor,
    branch_BNC: Tensor | None,
    gate_BTC: Tensor | None,
    extra_BNC: Tensor | None,
    shift_BTC: Tensor,
    scale_BTC: Tensor,
    *,
    quantize: Quantize | None = None,
) -> tuple[Tensor, Output]:
    """`residual`, then `modulate` of the new stream: (stream, modulated)."""
    stream = residual(x_BNC, branch_BNC, gate_BTC, extra_BNC).plain
    assert stream is not None
    return stream, modulate(stream, shift_BTC, scale_BTC, quantize=quantize)


def output_gate(main: Tensor, gate: Tensor, camera: Tensor | None = None, *, quantize: Quantize | None = None) -> Output:
    """(main + camera) * SiLU(gate), (B, N, C) each."""
    total = wide(main) if camera is None else wide(main) + wide(camera)
    return quantize_rows((total * F.silu(wide(gate))).to(main.dtype), quantize)


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in x's dtype."""
    return numerics.rms_norm(x, weight_C, eps).to(x.dtype)


def depthwise_glu(x_BNG: Tensor, taps_9G: Tensor, bias_G: Tensor, grid: tuple[int, int], *, quantize: Quantize | None = None) -> Output:
    """Depthwise 3x3 (zero padding, cross-correlation) with bias on every frame, then value * SiLU(gate): (B, N, 2G) -> (B, N, G).

    taps (9, 2G): row 3 * dy + dx of the kernel; the first G channels are values, the last G gates. `quantize` may not be "fp8_rows".
    """
    h, w = grid
    width = x_BNG.shape[-1]
    images = wide(x_BNG).reshape(-1, h, w, width).permute(0, 3, 1, 2)
    kernel = wide(taps_9G).t().reshape(width, 1, 3, 3)
    mixed = F.conv2d(images, kernel.to(images.dtype), wide(bias_G).to(images.dtype), padding=1, groups=width)
    value, gate = mixed.permute(0, 2, 3, 1).reshape(*x_BNG.shape[:-1], width).chunk(2, -1)
    return quantize_rows((value * F.silu(gate)).to(x_BNG.dtype), quantize)


def rope_heads(
    q_BNC: Tensor, k_BNC: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a softmax block: RMS over all channels, weight, RoPE by cos, sin (N, D/2). Returns (B, N, H, D) in the input's dtype."""
    q, k = (
        rotary.rotate_pairs(numerics.rms_norm(x, w, eps).unflatten(-1, (heads, -1)), cos, sin).to(x.dtype)
        for x, w in ((q_BNC, q_norm), (k_BNC, k_norm))
    )
    return q, k


def ucpe_heads(
    q_BNC: Tensor,
    k_BNC: Tensor,
    v_BNC: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rays: Tensor,
    rays_inverse: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    *,
    clamp: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Camera queries, keys and values of a softmax block: RMS over all channels and weight (not on values), then UCPE.

    rays, rays_inverse (B or 1, N, 4, 4); cos, sin (N, D/4). Returns (B, N, H, D) in the input's dtype.
    """
    split = [
        x.unflatten(-1, (heads, -1)) for x in (numerics.rms_norm(q_BNC, q_norm, eps), numerics.rms_norm(k_BNC, k_norm, eps), wide(v_BNC))
    ]
    matrices = (rays.transpose(-1, -2), rays_inverse, rays_inverse)
    turned = [rotary.ucpe(x, matrix, cos, sin) for x, matrix in zip(split, matrices)]
    if clamp:
        turned = [rotary.rms_clamp(after, before) for after, before in zip(turned, split)]
    q, k, v = (x.to(q_BNC.dtype) for x in turned)
    return q, k, v


def inverse_ucpe(x_BNHD: Tensor, rays: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Camera attention's output back from ray space, (B, N, H, D) -> (B, N, C)."""
    return rotary.ucpe(x_BNHD, rays, cos, -sin).to(x_BNHD.dtype).flatten(2)


def quantize_activations(x: Tensor, quantize: Quantize) -> Output:
    """The rows of x (..., K) quantized alone, where no fusion makes them."""
    return quantize_rows(x, quantize)


def fp8_values_transposed(v_BNHD: Tensor, scale: Tensor) -> Tensor:
    """Values quantized to e4m3 under one scale and laid out (B, H, D, N) for FP8 attention, whose second product needs adjacent keys."""
    quantized = quantize_rows(v_BNHD, Quantize("fp8", scale)).quantized
    assert quantized is not None
    return torch.clone(quantized.values.permute(0, 2, 3, 1), memory_format=torch.contiguous_format)  # type: ignore[union-attr]

"""Small layers: embeddings, modulation, 1x1 convolutions on tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanawm_kernels.numerics import wide

LAYER_NORM_EPS = 1e-6


class PointwiseConv(nn.Module):
    """A 1x1 convolution applied to tokens, holding the checkpoint's convolution-shaped weight.

    `ones` is the number of trailing unit kernel dimensions of the stored weight.
    """

    def __init__(self, inputs: int, outputs: int, ones: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *(1,) * ones))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """(B, C_in, T, h, w) -> tokens (B, N, C), frame-major."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = PointwiseConv(channels, hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.flatten(2).transpose(1, 2))


class NormWeight(nn.Module):
    """The learned weight of an RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the truncated timestep, then a two-layer MLP."""

    def __init__(self, hidden: int, width: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        half = width // 2
        # A constant and not part of the graph: at t = 1000 one unit in the last place of a frequency is 6e-5 radians.
        self.frequency = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10000.0) / half)).numpy()

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep (...,) float, truncated to an integer as in training -> (..., hidden)."""
        frequency = torch.from_numpy(self.frequency).to(timestep.device)
        angle = torch.trunc(timestep.float())[..., None] * frequency
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(next(self.mlp.parameters()).dtype))


class CaptionEmbedder(nn.Module):
    """Caption projection, (B, L, caption width) -> (B, L, C)."""

    def __init__(self, caption: int, hidden: int) -> None:
        super().__init__()
        self.y_proj = nn.ModuleDict({"fc1": nn.Linear(caption, hidden), "fc2": nn.Linear(hidden, hidden)})

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj["fc2"](F.gelu(self.y_proj["fc1"](y), approximate="tanh"))


def modulate(x_BNC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor) -> Tensor:
    """LayerNorm without weights, then (1 + scale) * x + shift with one row a frame; computed wide, returned in x's dtype."""
    B, N, C = x_BNC.shape
    T = shift_BTC.shape[1]
    normed = F.layer_norm(wide(x_BNC), (C,), eps=LAYER_NORM_EPS).reshape(B, T, N // T, C)
    out = normed * (1 + wide(scale_BTC).unsqueeze(2)) + wide(shift_BTC).unsqueeze(2)
    return out.reshape(B, N, C).to(x_BNC.dtype)


def gated_residual(x_BNC: Tensor, gate_BTC: Tensor, branch_BNC: Tensor) -> Tensor:
    """x + gate * branch with one gate row a frame; computed wide, returned in x's dtype."""
    B, N, C = x_BNC.shape
    T = gate_BTC.shape[1]
    update = wide(gate_BTC).unsqueeze(2) * wide(branch_BNC).reshape(B, T, N // T, C)
    return (wide(x_BNC) + update.reshape(B, N, C)).to(x_BNC.dtype)


class FinalLayer(nn.Module):
    """Modulated projection of tokens to velocity."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden))

    def forward(self, x_BNC: Tensor, t_BTC: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[i] + t_BTC for i in range(2))
        return self.linear(modulate(x_BNC, shift, scale))

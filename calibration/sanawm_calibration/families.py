"""Synthetic activations with the shapes of distribution that quantizers meet in diffusion transformers.

They rank methods on declared distributions, where no trained weights are needed; they say nothing of a trained model's quality.

Shapes: M rows, K channels, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(rows: int, channels: int, seed: int) -> Tensor:
    """Independent normal numbers (M, K): what rounding sees after a rotation."""
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def channel_outliers(rows: int, channels: int, seed: int) -> Tensor:
    """Normal rows in which one channel in 128 is 5 to 20 times larger: the modulated input of a block under AdaLN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    count = max(1, channels // 128)
    chosen = torch.randperm(channels, generator=generator)[:count]
    x[:, chosen] *= 5 + 15 * torch.rand(count, generator=generator)
    return x


def gated(rows: int, channels: int, seed: int) -> Tensor:
    """Products a silu(b) of normal numbers: the heavy-tailed input of a gated feed-forward network's second product."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, channels, generator=generator)
    return a * torch.nn.functional.silu(2 * b)


def massive_tokens(rows: int, channels: int, seed: int) -> Tensor:
    """Normal rows of which one in 64 carries a few channels 50 times larger: tokens that act as attention sinks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    tokens = torch.randperm(rows, generator=generator)[: max(1, rows // 64)]
    where = torch.randperm(channels, generator=generator)[:4]
    x[tokens[:, None], where[None, :]] *= 50
    return x


def correlated(rows: int, channels: int, seed: int) -> Tensor:
    """Rows near a subspace of a sixteenth of the channels: averages over values, as attention makes them."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, channels // 16)
    basis = torch.randn(rank, channels, generator=generator) / rank**0.5
    return torch.randn(rows, rank, generator=generator) @ basis + 0.1 * torch.randn(rows, channels, generator=generator)


FAMILIES: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": gaussian,
    "channel outliers": channel_outliers,
    "gated": gated,
    "massive tokens": massive_tokens,
    "correlated": correlated,
}


def random_weight(outputs: int, channels: int, seed: int) -> Tensor:
    """Normal weight (N, K) with variance 1 / K."""
    return torch.randn(outputs, channels, generator=torch.Generator().manual_seed(seed)) * channels**-0.5


def camera_delta(rows: int, channels: int, seed: int, size: float = 0.03) -> tuple[Tensor, Tensor]:
    """Activations (M, K) before and after a small change of conditioning: channel outliers, and the same plus a change of `size` of their rms.

    What a quantizer keeps of the difference is what a model keeps of a camera's motion.
    """
    before = channel_outliers(rows, channels, seed)
    change = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed + 1))
    return before, before + size * before.square().mean().sqrt() * change

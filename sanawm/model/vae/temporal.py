"""Left and right temporal context of the VAE's convolutions.

A convolution with a temporal kernel of 3 reads two frames more than it writes. Where they come from is the only difference between a
non-causal, a causal and a streaming decoder, so each is an object that a forward pass hands to every convolution. An object lives for one
call; modules keep nothing.

Letters: B batch, C channels, T frames, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sanawm.vae_state import CONTEXT_FRAMES


class TemporalContext(Protocol):
    """Source of the two frames around the input of each convolution."""

    @property
    def starts_clip(self) -> bool:
        """Whether the first frame given is the clip's first, which upsamplers do not double."""

    def extend(self, x_BCTHW: Tensor) -> Tensor:
        """The frames of `x` with two frames of context, (B,C,T+2,H,W)."""


class Causal:
    """Whole clip from the past alone: the first frame stands in for the two before it."""

    starts_clip = True

    def extend(self, x_BCTHW: Tensor) -> Tensor:
        return torch.cat([_first_twice(x_BCTHW), x_BCTHW], dim=2)


class Centred:
    """Whole clip from both sides: the first and the last frame are repeated once."""

    starts_clip = True

    def extend(self, x_BCTHW: Tensor) -> Tensor:
        return torch.cat([x_BCTHW[:, :, :1], x_BCTHW, x_BCTHW[:, :, -1:]], dim=2)


class Carried:
    """Part of a clip from the past alone: each convolution continues from the frames it read last.

    `previous` holds those frames in the order in which convolutions run, or is None at the start of the clip. `state` collects them for
    the next part.
    """

    def __init__(self, previous: Sequence[Tensor] | None) -> None:
        self.starts_clip = previous is None
        self._previous: Iterator[Tensor] | None = None if previous is None else iter(previous)
        self._state: list[Tensor] = []

    def extend(self, x_BCTHW: Tensor) -> Tensor:
        context = _first_twice(x_BCTHW) if self._previous is None else next(self._previous)
        extended = torch.cat([context, x_BCTHW], dim=2)
        # A copy, or the state would keep the memory of all frames alive.
        self._state.append(extended[:, :, -CONTEXT_FRAMES:].contiguous())
        return extended

    @property
    def state(self) -> tuple[Tensor, ...]:
        return tuple(self._state)


def _first_twice(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW[:, :, :1].expand(-1, -1, CONTEXT_FRAMES, -1, -1)

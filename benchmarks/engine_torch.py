"""Torch models of a world with a synthetic checkpoint's weights: the judges of the engine's numerics.

The weights of all parts are made at once, on all cores, while something else runs.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from sanawm.config import WorldConfig
from sanawm.keys import TensorInfo, dit_tensors, text_tensors, vae_tensors
from sanawm.model.checkpoint.values import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE

MAKERS = 16


class Weights:
    """Tensors of a synthetic checkpoint, rounded to the dtype in which it stores them; made by threads from now on, the largest first."""

    def __init__(self, world: WorldConfig, seed: int, stored: torch.dtype = torch.bfloat16) -> None:
        self._world = world
        self._pool = concurrent.futures.ThreadPoolExecutor(min(MAKERS, os.cpu_count() or 1))
        self._tables = {"dit": dit_tensors(world.dit), "text": text_tensors(world.text), "vae": vae_tensors(world.vae)}

        def make(name: str, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(synth_tensor(name, shape, seed)).to(stored)

        wanted = [(part, name, info) for part, table in self._tables.items() for name, info in table.items()]
        wanted.sort(key=lambda item: -item[2].numel)
        self._made = {(part, name): self._pool.submit(make, name, info.shape) for part, name, info in wanted}

    def _state(self, part: str) -> dict[str, Tensor]:
        table: Mapping[str, TensorInfo] = self._tables[part]
        return {name: self._made.pop((part, name)).result() for name in table}

    def transformer(self) -> SanaWM:
        """In the stored dtype, on the CPU; the weights are handed out once, as are those of the others."""
        with torch.device("meta"):
            model = SanaWM(self._world.dit)
        model.load_state_dict(self._state("dit"), assign=True)
        return model

    def vae(self) -> VideoVAE:
        """In the stored dtype, on the CPU."""
        with torch.device("meta"):
            model = VideoVAE(self._world.vae)
        model.load_state_dict(self._state("vae"), assign=True)
        return model.eval()

    def text(self, device: str) -> TextEncoder:
        """In float32 on a device. Its rotary frequencies are no weights and must stay float32: convert parameters alone."""
        with torch.device(device):
            encoder = TextEncoder.from_config(self._world.text, self._world.dit.text_tokens)
        encoder.model.load_state_dict(self._state("text"))
        return encoder

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

"""Torch modules of a checkpoint's parts, ready to export."""

from __future__ import annotations

import torch
from torch import nn

from sanawm.errors import CheckpointError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE


def load_part(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> nn.Module:
    """The text encoder (`text`), VAE (`vae`) or transformer (`dit`) in `dtype`, in evaluation mode without gradients.

    Weights that need no conversion stay memory-mapped. Raises CheckpointError.
    """
    config = checkpoint.world
    if name == "text":
        if checkpoint.text_dir is None:
            raise CheckpointError(
                f"{checkpoint.source} has no text encoder; give the Gemma-2 one with --text-encoder hf://Efficient-Large-Model/gemma-2-2b-it"
            )
        part: nn.Module = TextEncoder.from_folder(checkpoint.text_dir, config.dit.text_tokens, dtype)
    else:
        with torch.device("meta"):
            part = VideoVAE(config.vae) if name == "vae" else SanaWM(config.dit)
        state = checkpoint.load_vae(dtype=dtype) if name == "vae" else checkpoint.load_dit(dtype)
        part.load_state_dict(state, strict=True, assign=True)
    return part.eval().requires_grad_(False)

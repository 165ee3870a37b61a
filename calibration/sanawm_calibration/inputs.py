"""Clips as the transformer's inputs.

Shapes: T latent frames, L text tokens, E caption width, C latent channels, h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanawm.camera import (
    adjust_for_resize_crop,
    camera_conditions,
    chunk_plucker,
    default_intrinsics,
    normalise_intrinsics,
    relative_to_first,
    resize_and_crop,
    to_model_range,
)
from sanawm.errors import CheckpointError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm.model.text import TextEncoder
from sanawm.model.vae import VideoVAE
from sanawm.prompt import PromptTokenizer
from sanawm_calibration.clips import Clip


@dataclass(frozen=True)
class ClipInputs:
    """A clip ready to roll out, on the CPU.

    first_latent (1, C, 1, h, w) and text (1, L, E) in the encoders' dtype; text_mask (1, L) bool; camera (1, T, 20) and plucker
    (1, 48, T, h, w) float32.
    """

    clip: Clip
    first_latent: Tensor
    text: Tensor
    text_mask: Tensor
    camera: Tensor
    plucker: Tensor

    @property
    def latent_frames(self) -> int:
        return self.camera.shape[1]

    def noise(self, seed: int | None = None) -> Tensor:
        """(1, C, T, h, w) float32: the clip's starting noise with the first latent in frame 0; `seed` replaces the clip's."""
        _, C, _, h, w = self.first_latent.shape
        generator = torch.Generator().manual_seed(self.clip.seed if seed is None else seed)
        noise = torch.randn(1, C, self.latent_frames, h, w, generator=generator)
        noise[:, :, 0] = self.first_latent[:, :, 0].float()
        return noise


def open_tokenizer(checkpoint: Checkpoint) -> PromptTokenizer:
    """The checkpoint's tokenizer with its instruction prefix. Raises CheckpointError without one."""
    if checkpoint.tokenizer_file is None:
        raise CheckpointError(f"{checkpoint.source} has no tokenizer.json; give the text encoder's folder with --text-encoder")
    return PromptTokenizer.from_file(checkpoint.tokenizer_file, checkpoint.chi_prompt, checkpoint.world.dit.text_tokens)


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> SanaWM:
    """The checkpoint's transformer in `dtype` on `device`, without gradients."""
    with torch.device("meta"):
        model = SanaWM(checkpoint.dit_config)
    model.load_state_dict(checkpoint.load_dit(dtype), strict=True, assign=True)
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_clips(checkpoint: Checkpoint, clips: Sequence[Clip], dtype: torch.dtype, device: str = "cpu") -> list[ClipInputs]:
    """Run the text encoder and then the image encoder over all clips; each is freed when it is done."""
    texts = list(_encode_texts(checkpoint, clips, dtype, device))
    images = list(_encode_images(checkpoint, clips, dtype, device))
    found = []
    for clip, (text, mask), (latent, intrinsics) in zip(clips, texts, images):
        poses = relative_to_first(clip.poses)
        camera = torch.from_numpy(camera_conditions(poses, intrinsics, checkpoint.world))
        plucker = torch.from_numpy(chunk_plucker(poses, intrinsics, checkpoint.world))
        found.append(ClipInputs(clip, latent, text, mask, camera, plucker))
    return found


def _encode_texts(checkpoint: Checkpoint, clips: Sequence[Clip], dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    if checkpoint.text_dir is None:
        raise CheckpointError(f"{checkpoint.source} has no text encoder; give the Gemma-2 one with --text-encoder")
    tokenizer = open_tokenizer(checkpoint)
    encoder = TextEncoder.from_folder(checkpoint.text_dir, checkpoint.world.dit.text_tokens, dtype).to(device)
    for clip in clips:
        ids, mask = (torch.from_numpy(a).to(device) for a in tokenizer.encode(clip.prompt))
        text, kept = encoder(ids, mask)
        yield text.cpu(), kept.bool().cpu()


def _encode_images(checkpoint: Checkpoint, clips: Sequence[Clip], dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    world = checkpoint.world
    with torch.device("meta"):
        vae = VideoVAE(world.vae)
    vae.load_state_dict(checkpoint.load_vae(dtype=dtype), strict=True, assign=True)
    vae = vae.eval().to(device)
    for clip in clips:
        source = clip.image()
        image, geometry = resize_and_crop(source, world.image_height, world.image_width)
        rows = clip.intrinsics
        if rows is None:
            rows = normalise_intrinsics(default_intrinsics(source.shape[1], source.shape[0]), clip.frames)
        latent = vae.encode_mode(torch.from_numpy(to_model_range(image)).to(device, dtype))
        yield latent.cpu(), adjust_for_resize_crop(rows, geometry)

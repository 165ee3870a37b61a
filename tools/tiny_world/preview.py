"""A look at a checkpoint: streams clips from the first frames and writes one contact sheet, the rendered scene above each."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sanawm.camera import actions_to_poses
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import stream
from sanawm.model.text import TextEncoder
from sanawm.model.vae import StreamingDecoder, VideoVAE, to_uint8
from sanawm.prompt import PromptTokenizer
from tiny_world.clips import HEIGHT, INTRINSICS, WIDTH
from tiny_world.first_frames import SEEDS, first_frame_scene
from tiny_world.latents import camera_inputs, encode
from tiny_world.scene import PALETTES, render


class TinyWorld:
    """The checkpoint's models in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        world = checkpoint.world
        self.dit, self.vae = SanaWM(world.dit).eval(), VideoVAE(world.vae).eval()
        self.dit.load_state_dict(checkpoint.load_dit(torch.float32))
        self.vae.load_state_dict(checkpoint.load_vae(dtype=torch.float32))
        assert checkpoint.text_dir is not None and checkpoint.tokenizer_file is not None
        self.tokenizer = PromptTokenizer.from_file(checkpoint.tokenizer_file, checkpoint.chi_prompt, world.dit.text_tokens)
        self.text = TextEncoder.from_folder(checkpoint.text_dir, world.dit.text_tokens, torch.float32)

    @torch.no_grad()
    def stream(self, first: NDArray[np.uint8], prompt: str, poses: NDArray[np.floating], seed: int = 0) -> Tensor:
        """Latents (1, C, T, h, w) of a clip along poses (F, 4, 4) from the first frame (H, W, 3)."""
        text = self.dit.encode_text(*self.text(*map(torch.from_numpy, self.tokenizer.encode(prompt))))
        camera, plucker = camera_inputs(np.asarray(poses, np.float64))
        latent = encode(self.vae, first[None])
        noise = torch.randn(1, latent.shape[1], camera.shape[1], *latent.shape[3:], generator=torch.Generator().manual_seed(seed))
        noise[:, :, :1] = latent
        return torch.cat([step.latents for step in stream(self.dit, noise, text, camera, plucker)], 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Frames (F, H, W, 3) uint8."""
        return to_uint8(torch.cat(list(StreamingDecoder(self.vae).segments(latents)), 2))[0].permute(1, 2, 3, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--action", action="append", required=True)
    parser.add_argument("--every", type=int, default=24)
    args = parser.parse_args()
    world = TinyWorld(open_checkpoint(args.checkpoint))
    rows = []
    for kind, action in zip(list(SEEDS) * len(args.action), args.action):
        scene, poses = first_frame_scene(kind), actions_to_poses(action)
        truth = np.stack([render(scene, pose, INTRINSICS, HEIGHT, WIDTH) for pose in poses[:: args.every]])
        latents = world.stream(truth[0], PALETTES[kind].prompt, poses)
        print(kind, action, "latent deviation of each frame", [round(float(z.std()), 2) for z in latents[0].transpose(0, 1)])
        rows += [np.concatenate(list(truth), 1), np.concatenate(list(world.decode(latents)[:: args.every]), 1)]
    width = max(row.shape[1] for row in rows)
    Image.fromarray(np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0))) for row in rows])).save(args.sheet)


if __name__ == "__main__":
    main()

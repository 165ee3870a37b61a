"""Latents and camera inputs of rendered clips, every second one mirrored.

`python -m tiny_world.latents CLIPS VAE OUTPUT` writes a torch file with `latents` (N, C, T, h, w) normalised, `camera` (N, T, 20) and `plucker`
(N, 48, T, h, w), bfloat16 but for the camera.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanawm.camera import camera_conditions, chunk_plucker, relative_to_first
from sanawm.model.vae import VideoVAE
from tiny_world.clips import INTRINSICS, WORLD


def load_vae(path: Path) -> VideoVAE:
    vae = VideoVAE(WORLD.vae)
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae.eval()


def to_video(pixels: NDArray[np.uint8]) -> Tensor:
    """(F, H, W, 3) uint8 -> (1, 3, F, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def camera_inputs(poses: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """camera_conditions (1, T, 20) and chunk_plucker (1, 48, T, h, w) of a path (F, 4, 4)."""
    relative = relative_to_first(poses)
    return torch.from_numpy(camera_conditions(relative, INTRINSICS, WORLD)), torch.from_numpy(chunk_plucker(relative, INTRINSICS, WORLD))


def mirror(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The path seen in a mirror that swaps left and right."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    return flip @ poses @ flip


@torch.no_grad()
def encode(vae: VideoVAE, pixels: NDArray[np.uint8]) -> Tensor:
    """Normalised latents (1, C, T, h, w) float32; the encoder runs in the dtype of its weights."""
    dtype = vae.latents_mean.dtype
    return vae.encode_mode(to_video(pixels).to(dtype)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("clips", "vae", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int)
    args = parser.parse_args()
    pixels, poses = (np.load(args.clips / f"{name}.npy", mmap_mode="r")[args.first : args.last] for name in ("clips", "poses"))
    # bfloat16 is several times faster on recent CPUs; its error is far below the noise that training adds.
    vae = load_vae(args.vae).to(torch.bfloat16)
    latents, cameras, maps = [], [], []
    for index, (video, path) in enumerate(zip(pixels, poses)):
        if index % 2:
            video, path = video[:, :, ::-1], mirror(path)
        camera, plucker = camera_inputs(path)
        latents.append(encode(vae, video).to(torch.bfloat16))
        cameras.append(camera)
        maps.append(plucker.to(torch.bfloat16))
    torch.save({"latents": torch.cat(latents), "camera": torch.cat(cameras), "plucker": torch.cat(maps)}, args.output)


if __name__ == "__main__":
    main()

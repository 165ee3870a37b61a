"""Rendered clips on disk: the training data of both stages, and the held-out scenes.

`python -m tiny_world.clips FOLDER --clips N --frames F --seed S` writes `clips.npy` (N, F, H, W, 3) uint8 and `poses.npy` (N, F, 4, 4) float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from sanawm.camera import default_intrinsics
from sanawm.config import tiny_config
from tiny_world.paths import random_path
from tiny_world.scene import Scene, random_scene, render_clip

WORLD = tiny_config()
HEIGHT, WIDTH = WORLD.image_height, WORLD.image_width
INTRINSICS = default_intrinsics(WIDTH, HEIGHT)


def clip(seed: int, index: int, frames: int, start: int = 0) -> tuple[Scene, NDArray[np.float64]]:
    """Scene and path (frames, 4, 4) of a clip; `start` frames of the walk are passed over first, so it need not begin level or at rest."""
    rng = np.random.default_rng([seed, index])
    skipped = int(rng.integers(0, start + 1))
    path = random_path(rng, skipped + frames)
    return random_scene(rng, path=path), path[skipped:]


def clips(seed: int, count: int, frames: int, start: int = 0) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    """Pixels (frames, H, W, 3) and poses of clip after clip."""
    for index in range(count):
        scene, path = clip(seed, index, frames, start)
        yield render_clip(scene, path, INTRINSICS, HEIGHT, WIDTH), path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("clips", 400), ("frames", 17), ("seed", 1), ("start", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pixels = open_memmap(args.folder / "clips.npy", "w+", np.uint8, (args.clips, args.frames, HEIGHT, WIDTH, 3))
    poses = open_memmap(args.folder / "poses.npy", "w+", np.float64, (args.clips, args.frames, 4, 4))
    for index, (video, path) in enumerate(clips(args.seed, args.clips, args.frames, args.start)):
        pixels[index], poses[index] = video, path


if __name__ == "__main__":
    main()

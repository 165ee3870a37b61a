"""First frames that ship with the tiny world, of scenes that training has not seen.

`python -m tiny_world.first_frames FOLDER` writes a PNG of each kind of scene and `first_frames.json` with prompts and the camera.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sanawm.camera import actions_to_poses
from sanawm.camera.intrinsics import DEFAULT_FOV_DEGREES
from tiny_world.clips import HEIGHT, INTRINSICS, WIDTH
from tiny_world.scene import PALETTES, Scene, random_scene, render

# Seeds of the scenes, chosen for pillars in view; clips for training use pairs of numbers as seeds, so these differ from all of them.
SEEDS = {"plain": 7, "desert": 2, "dusk": 1}
# Pillars keep out of the way of these walks.
WALKS = ("w-96,d-24,w-96", "w-96,a-24,w-96")


def first_frame_scene(kind: str) -> Scene:
    """The scene that `kind`.png shows, seen from the identity pose."""
    path = np.concatenate([actions_to_poses(walk) for walk in WALKS])
    return random_scene(np.random.default_rng(SEEDS[kind]), kind, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for kind in SEEDS:
        pixels = render(first_frame_scene(kind), np.eye(4), INTRINSICS, HEIGHT, WIDTH, samples=3)
        Image.fromarray(pixels).save(folder / f"{kind}.png", optimize=True)
    info = {
        "camera": {
            "axes": "OpenCV: +x right, +y down, +z forward; the first frame is the identity, level, 0.6 units above the ground",
            "horizontal_fov_degrees": DEFAULT_FOV_DEGREES,
            "intrinsics": [round(float(value), 4) for value in INTRINSICS],
            "image_size": [WIDTH, HEIGHT],
        },
        "frames": [{"image": f"{kind}.png", "prompt": PALETTES[kind].prompt} for kind in SEEDS],
    }
    (folder / "first_frames.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

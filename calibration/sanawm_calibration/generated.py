"""The calibration set that the package makes itself: drawn first frames and camera paths stratified over kinds of motion.

Real clips of the application are better. This set needs no files, exercises every camera motion the action keys have, and reaches the steady
attention window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import SCHEMES, ActionIntegrator, choose_scheme
from sanawm.camera.pack import STREAMING_STRIDE
from sanawm_calibration.clips import Clip
from sanawm_calibration.scenes import SCENES, draw


@dataclass(frozen=True)
class Motion:
    """A stratum: keys held for shares of the clip, and speeds relative to the action scheme's."""

    name: str
    keys: tuple[str, ...]
    speed: float = 1.0


MOTIONS = (
    Motion("still", ("",)),
    Motion("forward", ("w",)),
    Motion("strafe", ("l",)),
    Motion("slow yaw", ("d",), 0.5),
    Motion("fast yaw", ("a",), 2.5),
    Motion("pitch", ("i", "k")),
    Motion("mixed", ("w", "wd", "j", "sa", "wi", "wk", "d", "wl")),
)


def motion_poses(motion: Motion, frames: int) -> NDArray[np.float64]:
    """(F, 4, 4) camera-to-world poses of a motion; each of its key sets is held for an equal share of the clip."""
    scheme = SCHEMES["official-2026-08"]
    speeds = (scheme.translation_speed * motion.speed, scheme.rotation_degrees * motion.speed)
    integrator = ActionIntegrator(choose_scheme("none-1", scheme, *speeds))
    poses = [integrator.pose]
    for frame in range(frames - 1):
        poses.append(integrator.step(motion.keys[frame * len(motion.keys) // (frames - 1)]))
    return np.stack(poses)


def _shortened(prompt: str, fits: Callable[[str], bool]) -> str:
    words = prompt.split()
    while len(words) > 1 and not fits(" ".join(words)):
        words.pop()
    return " ".join(words)


def generated_set(
    clips: int = 16, chunks: int = 8, size: tuple[int, int] = (1280, 704), fits: Callable[[str], bool] = lambda prompt: True
) -> list[Clip]:
    """`clips` clips of `chunks` streaming chunks each, first frames of size (width, height).

    Motions take turns, so 7 clips have one of each; scenes and seeds change from clip to clip. A prompt that does not fit the model (`fits`;
    small ones have room for few tokens) loses its last words.
    """
    frames = STREAMING_STRIDE * chunks + 1
    found = []
    for index in range(clips):
        motion, scene = MOTIONS[index % len(MOTIONS)], SCENES[index % len(SCENES)]

        def picture(kind: str = scene.name, seed: int = index) -> NDArray[np.uint8]:
            return draw(kind, *size, seed)

        name = f"{index:02d}-{motion.name.replace(' ', '-')}-{scene.name}"
        found.append(Clip(name, _shortened(scene.prompt, fits), picture, motion_poses(motion, frames), None, 1000 + index, motion.name))
    return found

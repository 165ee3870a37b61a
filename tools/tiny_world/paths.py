"""Random walks in the official action language."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import ActionIntegrator

# What a person does: mostly walk, often turn, rarely look up or down.
KEYS = ("w", "wa", "wd", "a", "d", "w", "j", "l", "s", "none", "wi", "wk", "wa", "wd", "a", "d")


def random_path(rng: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """(frames, 4, 4) camera-to-world poses, the first the identity, OpenCV axes; segments last 0.5 to 3 s."""
    integrator = ActionIntegrator()
    poses = [integrator.pose]
    level = 0  # frames of looking up less those of looking down, kept small
    while len(poses) < frames:
        keys = str(rng.choice(KEYS))
        if "i" in keys or "k" in keys:
            length = int(rng.integers(8, 16))
            keys = "wk" if level > 0 else "wi" if level < 0 else keys
            level += length if "i" in keys else -length
            level = 0 if abs(level) < 8 else level
        else:
            length = int(rng.integers(8, 48))
        poses += [integrator.step("" if keys == "none" else keys) for _ in range(length)]
    return np.stack(poses[:frames])

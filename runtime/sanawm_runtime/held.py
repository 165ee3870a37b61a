"""Keys as a person holds them, turned into the keys of each frame."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sanawm.camera.actions import KEYS
from sanawm.errors import CameraError

# A tap moves for at least this long, or it would be invisible.
_LEAST_FRAMES = 4


class HeldKeys:
    """What is held now, and what was tapped since it was last asked.

    A chunk takes its keys at once, when its turn begins. Whatever is down then is held for all of its frames. A key that went down and up
    in between would be lost, so it is held for as many frames as it was down. Safe to use from several threads.
    """

    def __init__(self, fps: float, clock: Callable[[], float] | None = None) -> None:
        self._fps = fps
        self._clock = clock or time.monotonic
        self._lock = threading.Lock()
        self._down: dict[str, float] = {}
        self._tapped: dict[str, float] = {}

    @property
    def held(self) -> str:
        """The keys that are down, in the order of `KEYS`."""
        return "".join(key for key in KEYS if key in self._down)

    def set(self, keys: str) -> None:
        """Exactly these keys are down from now on ("" for none). Raises CameraError for an unknown key."""
        wanted = checked_keys(keys)
        now = self._clock()
        with self._lock:
            for key in self._down.keys() - wanted:
                self._tapped[key] = self._tapped.get(key, 0.0) + now - self._down.pop(key)
            for key in wanted - self._down.keys():
                self._down[key] = now

    def take(self, frames: int) -> list[str]:
        """The keys of each of the next frames; forgets the taps."""
        with self._lock:
            seconds = {**self._tapped, **dict.fromkeys(self._down, frames / self._fps)}
            self._tapped.clear()
        counts = {key: min(frames, max(_LEAST_FRAMES, round(second * self._fps))) for key, second in seconds.items()}
        return ["".join(key for key in KEYS if frame < counts.get(key, 0)) for frame in range(frames)]


def checked_keys(keys: str) -> set[str]:
    """The keys of a string such as "wd". Raises CameraError for an unknown one."""
    found = set(keys.lower())
    if unknown := sorted(found - set(KEYS)):
        raise CameraError(f"unknown key '{unknown[0][:20]}'; the keys are {' '.join(KEYS)}")
    return found

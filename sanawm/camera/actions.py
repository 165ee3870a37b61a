"""Action strings such as `w-80,dw-40`, and the camera motion they stand for.

The same letters meant different motions in different releases, so a string may name its scheme: `official-2026-05: w-80,dw-40`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sanawm.camera.poses import MAX_FRAMES
from sanawm.errors import CameraError

KEYS = "wasdijkl"


@dataclass(frozen=True)
class ActionScheme:
    """One release's reading of the keys.

    w/s move forward and back and i/k pitch up and down in every scheme; a/d and j/l yaw or strafe. Speeds are per pixel frame: units of
    the pose's translation, and degrees.
    """

    name: str
    yaw_keys: Literal["ad", "jl"]
    translation_speed: float
    rotation_degrees: float
    pitch_limit_degrees: float
    # At the limit: stop exactly on it, or ignore the whole step that would pass it.
    pitch_stop: Literal["clamp", "ignore"]
    # Velocities ease toward their targets instead of jumping.
    smooth: bool
    # Added to the length when a heading is normalised.
    heading_epsilon: float
    # Yaw that strafing adds, as a fraction of the rotation speed.
    strafe_yaw: float = 0.0

    @property
    def strafe_keys(self) -> str:
        return "jl" if self.yaw_keys == "ad" else "ad"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        ActionScheme("official-2026-08", "ad", 0.025, 0.6, 60.0, "clamp", True, 1e-6),
        ActionScheme("official-2026-05", "jl", 0.05, 1.2, 85.0, "ignore", False, 1e-6),
        # As official-2026-05 but for the epsilon, a difference of one millionth of the distance.
        ActionScheme("diffusers-0.42", "jl", 0.05, 1.2, 85.0, "ignore", False, 0.0),
        # The speed of its streaming pipelines; its bidirectional one moves 0.05 a frame.
        ActionScheme("sglang-0.5", "jl", 0.04, 1.2, 85.0, "ignore", False, 1e-6, strafe_yaw=0.4),
    )
}
DEFAULT_SCHEME = "official-2026-08"

# Time constants of the smoothing in seconds: toward a held key's speed, and back to rest. Frames last 1/16 s whatever the playback rate.
_HOLD_SECONDS, _REST_SECONDS, _FRAME_SECONDS = 0.45, 1.0, 1 / 16

Step = tuple[frozenset[str], int]


def find_scheme(name: str) -> ActionScheme:
    """The scheme of that name. Raises CameraError for an unknown one."""
    if name not in SCHEMES:
        raise CameraError(f"unknown action scheme '{name[:40]}'; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def split_scheme(text: str) -> tuple[ActionScheme | None, str]:
    """The scheme an action string names (None if it names none) and the rest of the string. Raises CameraError for an unknown scheme."""
    prefix, colon, rest = text.partition(":")
    return (find_scheme(prefix.strip().lower()), rest) if colon else (None, text)


def parse_actions(text: str) -> list[Step]:
    """The segments of an action string as (held keys, pixel frames).

    text: comma-separated `<keys>-<frames>`, keys out of `wasdijkl` in any case or `none`; whitespace is ignored; a scheme prefix is checked
    and left out (see `split_scheme`). Raises CameraError naming the segment for an empty string or segment, an unknown or repeated key, a
    frame count that is not a positive number, or more than 100,000 frames in all.
    """
    body = "".join(split_scheme(text)[1].replace("，", ",").split())
    if not body:
        raise CameraError("the action string is empty; write segments such as w-80,dw-40")
    steps: list[Step] = []
    total = 0
    for position, segment in enumerate(body.split(","), start=1):
        where = f"action segment {position} ('{segment[:40]}')"
        names, dash, count = segment.rpartition("-")
        if not dash or not names:
            raise CameraError(f"{where}: expected <keys>-<frames> such as w-80 or none-10; correct it or remove the stray comma")
        if not (count.isascii() and count.isdigit()) or not count.strip("0"):
            raise CameraError(f"{where}: expected a positive whole number of frames, found '{count[:20]}'; write for example w-40")
        # The length test keeps int() from ever seeing thousands of digits.
        frames = int(count) if len(count) <= 12 else MAX_FRAMES + 1
        total += frames
        if total > MAX_FRAMES:
            raise CameraError(f"{where}: the string asks for more than {MAX_FRAMES:,} frames; shorten it")
        steps.append((_held_keys(names.lower(), where), frames))
    return steps


def _held_keys(names: str, where: str) -> frozenset[str]:
    if names == "none":
        return frozenset()
    for index, key in enumerate(names):
        if key not in KEYS:
            raise CameraError(f"{where}: unknown key '{key}'; the keys are {' '.join(KEYS)}, or none to hold still")
        if key in names[:index]:
            raise CameraError(f"{where}: the key '{key}' appears twice; write each held key once")
    return frozenset(names)


class ActionIntegrator:
    """The camera that held keys move, one pixel frame at a time.

    Starts at the identity. `pose` is the current camera-to-world matrix, (4, 4) float64, OpenCV axes; `step` advances it.
    """

    def __init__(self, scheme: str | ActionScheme = DEFAULT_SCHEME) -> None:
        self.scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
        self.pose = np.eye(4)
        self._pitch = 0.0
        # Forward, strafe, yaw, pitch, a frame.
        self._velocity = np.zeros(4)
        self._held: frozenset[str] = frozenset()

    def step(self, keys: Iterable[str]) -> NDArray[np.float64]:
        """Advance one pixel frame with these keys held (a string such as 'wd', or single letters).

        Returns the new pose, (4, 4) float64. Opposite keys cancel. Raises CameraError for an unknown key.
        """
        held = frozenset(key.lower() for key in keys)
        if unknown := sorted(held - set(KEYS)):
            raise CameraError(f"unknown key '{unknown[0][:20]}'; the keys are {' '.join(KEYS)}")
        self._accelerate(held)
        self._move(*self._velocity)
        return self.pose.copy()

    def _accelerate(self, held: frozenset[str]) -> None:
        scheme = self.scheme

        def axis(pair: str) -> int:
            return (pair[1] in held) - (pair[0] in held)

        radians = math.radians(scheme.rotation_degrees)
        strafe = axis(scheme.strafe_keys)
        target = np.array(
            [
                axis("sw") * scheme.translation_speed,
                strafe * scheme.translation_speed,
                (axis(scheme.yaw_keys) + scheme.strafe_yaw * strafe) * radians,
                axis("ki") * radians,
            ]
        )
        # A key that was not down before takes effect at once; everything else eases.
        if scheme.smooth and held <= self._held:
            seconds = np.where(target != 0, _HOLD_SECONDS, _REST_SECONDS)
            self._velocity = self._velocity + (1 - np.exp(-_FRAME_SECONDS / seconds)) * (target - self._velocity)
        else:
            self._velocity = target
        self._held = held

    def _move(self, forward: float, strafe: float, yaw: float, pitch: float) -> None:
        limit = math.radians(self.scheme.pitch_limit_degrees)
        reached = self._pitch + pitch
        if abs(reached) > limit:
            reached = math.copysign(limit, reached) if self.scheme.pitch_stop == "clamp" else self._pitch
        # Yaw turns about the world's vertical, pitch about the camera's own x axis.
        rotation = _about_y(yaw) @ self.pose[:3, :3] @ _about_x(reached - self._pitch)
        self._pitch = reached
        position = self.pose[:3, 3] + forward * self._heading(rotation[:, 2]) + strafe * self._heading(rotation[:, 0])
        self.pose = np.eye(4)
        self.pose[:3, :3] = rotation
        self.pose[:3, 3] = position

    def _heading(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        """The direction within the horizontal plane, of length one."""
        level = direction * [1, 0, 1]
        length = math.hypot(level[0], level[2])
        return level / (length + self.scheme.heading_epsilon) if length else level


def _about_x(radians: float) -> NDArray[np.float64]:
    c, s = math.cos(radians), math.sin(radians)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _about_y(radians: float) -> NDArray[np.float64]:
    c, s = math.cos(radians), math.sin(radians)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def choose_scheme(
    text: str,
    scheme: str | ActionScheme | None = None,
    translation_speed: float | None = None,
    rotation_degrees: float | None = None,
) -> ActionScheme:
    """The scheme under which to read an action string: the one it names, else `scheme`, else the default, with speeds replaced if given.

    Raises CameraError when the string and the caller name different schemes, or a speed is not a finite number from 0 up.
    """
    named = split_scheme(text)[0]
    given = find_scheme(scheme) if isinstance(scheme, str) else scheme
    if named and given and named.name != given.name:
        raise CameraError(f"the action string names the scheme {named.name} and {given.name} was asked for; drop one of the two")
    chosen = given or named or find_scheme(DEFAULT_SCHEME)
    return dataclasses.replace(
        chosen,
        translation_speed=_speed("translation", translation_speed, chosen.translation_speed),
        rotation_degrees=_speed("rotation", rotation_degrees, chosen.rotation_degrees),
    )


def _speed(kind: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and value >= 0):
        raise CameraError(f"expected a {kind} speed per frame of 0 or more, found {value:g}; choose for example {default:g}")
    return value


def actions_to_poses(text: str, scheme: str | ActionScheme | None = None) -> NDArray[np.float32]:
    """The camera path of an action string.

    N frames in all give N + 1 poses, the first the identity: (N + 1, 4, 4) float32 camera-to-world, OpenCV axes. Integrated in float64.
    Raises CameraError as `parse_actions` and `choose_scheme` do.
    """
    steps = parse_actions(text)
    integrator = ActionIntegrator(choose_scheme(text, scheme))
    poses = [integrator.pose, *(integrator.step(keys) for keys, frames in steps for _ in range(frames))]
    return np.stack(poses).astype(np.float32)

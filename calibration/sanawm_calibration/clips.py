"""Calibration sets: clips of a first frame, a prompt, a camera path, intrinsics and a seed.

A set is a manifest (TOML or JSON), a folder, or the one the package makes itself (`generated`). Manifest:

    [[clip]]
    image = "street.png"
    prompt = "A quiet street at dusk"
    poses = "street.npy"            # or actions = "w-80,dw-112"
    intrinsics = [900, 900, 640, 352]   # optional: four numbers or a file, in pixels of the image
    seed = 7                        # optional
    name = "street"                 # optional

Paths are relative to the manifest. In a folder every subfolder is a clip: image.png (or .jpg, .webp), prompt.txt, poses.npy (.json, .txt) or
actions.txt, and optionally intrinsics.npy (.json, .txt).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import (
    actions_to_poses,
    choose_scheme,
    fit_length,
    frames_to_snap,
    load_image,
    load_intrinsics,
    load_poses,
    normalise_intrinsics,
)
from sanawm.errors import CameraError, InputError
from sanawm_calibration.errors import CalibrationError

GENERATED = "generated"
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ARRAYS = (".npy", ".json", ".txt")
_FIELDS = {"name", "image", "prompt", "poses", "actions", "intrinsics", "seed"}
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """One rollout to calibrate on.

    image: (H, W, 3) uint8, read or drawn when it is asked for; poses (F, 4, 4) float64, F = 24k + 1; intrinsics (F, 4) in pixels of the
    image, or None for a default camera. `motion` names the stratum of a generated clip.
    """

    name: str
    prompt: str
    image: Callable[[], Image]
    poses: NDArray[np.float64]
    intrinsics: NDArray[np.float64] | None = None
    seed: int = 42
    motion: str = ""

    @property
    def frames(self) -> int:
        return len(self.poses)

    def limited(self, frames: int) -> Clip:
        """The clip's first `frames` pixel frames, all of it where it is shorter."""
        if self.frames <= frames:
            return self
        rows = None if self.intrinsics is None else self.intrinsics[:frames]
        return Clip(self.name, self.prompt, self.image, self.poses[:frames], rows, self.seed, self.motion)

    def describe(self) -> dict[str, Any]:
        """The clip as the calibration file records it."""
        return {"name": self.name, "prompt": self.prompt, "frames": self.frames, "seed": self.seed, "motion": self.motion, "digest": self.digest()}

    def digest(self) -> str:
        """SHA-256 of everything that decides the rollout, 16 hex digits."""
        total = hashlib.sha256(json.dumps([self.prompt, self.seed]).encode())
        for array in (self.image(), self.poses, self.intrinsics):
            if array is not None:
                total.update(repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()[:16]


def open_set(source: str | Path) -> list[Clip]:
    """The clips of a manifest file or a folder. Raises CalibrationError naming the clip, or the error of the file at fault."""
    path = Path(source)
    if path.is_file():
        return _manifest(path)
    if not path.is_dir():
        raise CalibrationError(f"{path}: no such calibration set; give a manifest, a folder, or '{GENERATED}' for the one made by this package")
    for name in ("manifest.toml", "manifest.json"):
        if (path / name).is_file():
            return _manifest(path / name)
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    if not folders:
        raise CalibrationError(f"{path}: expected a manifest.toml or a subfolder for each clip, found neither")
    return _distinct([_folder(folder) for folder in folders])


def _distinct(clips: list[Clip]) -> list[Clip]:
    names = [clip.name for clip in clips]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise CalibrationError(f"the clip name {repeated[0]} appears twice; names identify finished work, so give each clip its own")
    return clips


def _manifest(path: Path) -> list[Clip]:
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: not a readable TOML or JSON manifest ({error}); correct it") from error
    clips = data.get("clip") if isinstance(data, dict) else None
    if not isinstance(clips, list) or not clips or set(data) != {"clip"}:
        raise CalibrationError(f"{path}: expected a list of [[clip]] tables and nothing else")
    return _distinct([_entry(path, number, clip) for number, clip in enumerate(clips, start=1)])


def _entry(path: Path, number: int, data: Any) -> Clip:
    where = f"{path}, clip {number}"
    if not isinstance(data, dict):
        raise CalibrationError(f"{where}: expected a table, found {type(data).__name__}")
    if unknown := sorted(set(data) - _FIELDS):
        raise CalibrationError(f"{where}: unknown settings {', '.join(unknown)}; the known ones are {', '.join(sorted(_FIELDS))}")
    for key in ("image", "prompt"):
        if not isinstance(data.get(key), str):
            raise CalibrationError(f"{where}: expected {key} to be given, as text in quotes")
    seed = data.get("seed", 42)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CalibrationError(f"{where}: expected seed to be a whole number from 0 up, found {seed!r}")
    base = path.parent
    poses = base / data["poses"] if "poses" in data else None
    intrinsics = data.get("intrinsics")
    rows: Any = str(base / intrinsics) if isinstance(intrinsics, str) else intrinsics
    name = str(data.get("name", f"clip-{number:03d}"))
    return _clip(where, name, base / data["image"], data["prompt"], poses, data.get("actions"), rows, seed)


def _folder(folder: Path) -> Clip:
    image = _one(folder, "image", _IMAGES)
    prompt = folder / "prompt.txt"
    actions = folder / "actions.txt"
    poses = None if actions.is_file() else _one(folder, "poses", _ARRAYS)
    try:
        text = prompt.read_text(encoding="utf-8").strip()
        keys = actions.read_text(encoding="utf-8").strip() if actions.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{folder}: expected a readable prompt.txt ({error})") from error
    intrinsics = next((str(folder / f"intrinsics{s}") for s in _ARRAYS if (folder / f"intrinsics{s}").is_file()), None)
    return _clip(str(folder), folder.name, image, text, poses, keys, intrinsics, 42)


def _one(folder: Path, stem: str, suffixes: Iterable[str]) -> Path:
    found = [folder / f"{stem}{s}" for s in suffixes if (folder / f"{stem}{s}").is_file()]
    if len(found) != 1:
        raise CalibrationError(f"{folder}: expected one file {stem} with a suffix out of {', '.join(suffixes)}, found {len(found)}")
    return found[0]


def _clip(
    where: str, name: str, image: Path, prompt: str, poses: Path | None, actions: str | None, intrinsics: Any, seed: int
) -> Clip:
    if (poses is None) == (actions is None):
        raise CalibrationError(f"{where}: expected either poses or actions")
    try:
        path = load_poses(poses) if poses is not None else actions_to_poses(str(actions), choose_scheme(str(actions))).astype(np.float64)
        frames = frames_to_snap(len(path), "streaming", upper_bound=len(path))
        path = fit_length(path, frames, "trim", source=name)
        picture = np.asarray(load_image(image))
        rows = None
        if intrinsics is not None:
            rows = load_intrinsics(intrinsics, frames) if isinstance(intrinsics, str) else normalise_intrinsics(intrinsics, frames)
    except (CameraError, InputError) as error:
        raise CalibrationError(f"{where}: {error}") from error
    return Clip(name, prompt, lambda: picture, path, rows, seed)

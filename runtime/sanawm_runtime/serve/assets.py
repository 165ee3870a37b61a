"""The page's files, read once at the start and served by name from memory, so that no request reaches the file system."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from PIL import Image

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_THUMBNAIL = (480, 480)


@dataclass(frozen=True)
class Asset:
    """A file with its media type and entity tag."""

    data: bytes
    media_type: str
    etag: str


def asset(data: bytes, media_type: str) -> Asset:
    return Asset(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _files(folder: Traversable, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir(), key=lambda e: e.name) if entry.name.endswith(suffixes)}


def page_files() -> dict[str, Asset]:
    """Everything the page consists of, by file name."""
    files = _files(resources.files("sanawm_runtime.serve") / "page", tuple(_TYPES))
    return {name: asset(data, _TYPES[name[name.rindex(".") :]]) for name, data in files.items()}


@dataclass(frozen=True)
class Sample:
    """A first frame that comes with sanawm, and the sentence that goes with it."""

    image: bytes
    prompt: str


def sample_images() -> dict[str, Sample]:
    """The samples by name, in their own order."""
    folder = resources.files("sanawm") / "assets" / "first_frames"
    if not (folder / "first_frames.json").is_file():
        return {}
    listed = json.loads((folder / "first_frames.json").read_text("utf-8"))["frames"]
    return {entry["image"].rpartition(".")[0]: Sample((folder / entry["image"]).read_bytes(), entry["prompt"]) for entry in listed}


def thumbnail(data: bytes) -> Asset:
    """A small JPEG of one of our own images."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail(_THUMBNAIL)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, subsampling=0)
    return asset(out.getvalue(), "image/jpeg")

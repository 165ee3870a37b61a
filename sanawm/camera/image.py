"""First-frame image: safe loading, resize and centre crop, model range."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# 80 million pixels are 240 MB decoded: beyond any ordinary camera, below the size at which Pillow itself warns of a decompression bomb.
MAX_PIXELS = 80_000_000
MAX_FILE_BYTES = 256 * 2**20

# What people give as a first frame. Pillow's other readers stay closed to strangers' files: EPS starts Ghostscript, TIFF nests codecs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)


@dataclass(frozen=True)
class CropGeometry:
    """How a source image became the model's: resized, then cropped. Sizes are (width, height), the offset is (left, top), in pixels."""

    source: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]


def load_image(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture from a path or from the bytes of a file.

    Returns a decoded RGB Pillow image in display orientation (EXIF applied), transparency laid over black, 16-bit grey reduced to 8.
    Raises InputError when it is missing, not a PNG, JPEG, WebP or BMP, truncated, or larger than `max_pixels` (80 million).
    """
    from PIL import Image, ImageOps

    name, data = _read_bytes(source)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        # The header is enough to refuse; nothing has been decoded yet.
        if width * height > max_pixels:
            raise InputError(f"{name}: {width}x{height} is more than {max_pixels:,} pixels; scale the image down first")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: the image has more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image; expected a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, convert it to PNG") from error
    except _DECODE_ERRORS as error:
        raise InputError(f"{name}: the image is damaged or truncated ({error}); copy or export it again") from error


def _read_bytes(source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        name, size = "the image", len(source)
    else:
        name = os.fspath(source)
        try:
            size = Path(name).stat().st_size
            data = Path(name).read_bytes() if size <= MAX_FILE_BYTES else b""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{name}: cannot be read ({reason}); check the path and its permissions") from error
    if size > MAX_FILE_BYTES:
        raise InputError(f"{name}: {size:,} bytes is more than the {MAX_FILE_BYTES:,} an image file may have; scale the image down first")
    return name, source if isinstance(source, bytes) else data


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "I;16", "I;16B"):
        # Pillow clips 16-bit grey (of a PNG, in one of these modes by version) to 255 on conversion, so it is scaled here.
        image = Image.fromarray(((np.asarray(image, dtype=np.int64) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def resize_crop_geometry(source_width: int, source_height: int, height: int, width: int) -> CropGeometry:
    """Sizes of the aspect-preserving resize that covers height x width, and the offset of the centre crop.

    Raises InputError for an image so elongated that the resized picture would exceed 80 million pixels.
    """
    scale = max(height / source_height, width / source_width)
    resized = max(width, round(source_width * scale)), max(height, round(source_height * scale))
    if resized[0] * resized[1] > MAX_PIXELS:
        raise InputError(f"an image of {source_width}x{source_height} is too elongated to fill {width}x{height}; crop it first")
    return CropGeometry((source_width, source_height), resized, ((resized[0] - width) // 2, (resized[1] - height) // 2))


def resize_and_crop(image: Image.Image | NDArray[np.uint8], height: int, width: int) -> tuple[NDArray[np.uint8], CropGeometry]:
    """Resize with Lanczos until height x width is covered, then crop the centre, as the published pipelines do.

    image: an RGB Pillow image, or uint8 (H, W, 3). Returns uint8 (height, width, 3) and the geometry that `adjust_for_resize_crop` needs.
    Raises InputError for another kind of array or too elongated an image.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"expected an RGB image as uint8 (H, W, 3), found {image.dtype} {image.shape}; convert it first")
        image = Image.fromarray(image)
    geometry = resize_crop_geometry(*image.size, height, width)
    left, top = geometry.offset
    resized = image.convert("RGB").resize(geometry.resized, Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + width, top + height))).copy(), geometry


def to_model_range(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (H, W, 3) to float32 (1, 3, 1, H, W) in [-1, 1], the VAE encoder's input of one frame."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"expected uint8 (H, W, 3), found {image.dtype} {image.shape}; use resize_and_crop first")
    unit = image.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((unit * 2 - 1).transpose(2, 0, 1))[None, :, None]

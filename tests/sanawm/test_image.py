"""First-frame image: loading, resize and crop, model range."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sanawm.camera import load_image, resize_and_crop, to_model_range
from sanawm.camera.image import MAX_PIXELS, resize_crop_geometry
from sanawm.errors import InputError

KINDS = st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"])


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats(tmp_path, picture, kind):
    file = tmp_path / "image"
    file.write_bytes(encode(picture, kind))
    for source in (file, str(file), file.read_bytes()):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats(kind):
    smooth = Image.linear_gradient("L").convert("RGB")
    loaded = load_image(encode(smooth, kind, quality=95))
    # A smooth ramp at quality 95 moves by a few levels at most.
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(smooth)).max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_colour_modes(picture, mode):
    converted = picture.convert(mode)
    loaded = load_image(encode(converted))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(converted.convert("RGB")))


def test_cmyk():
    loaded = load_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
    # Full cyan through a lossy format.
    assert np.abs(np.asarray(loaded).astype(int) - [0, 255, 255]).max() <= 3


def test_transparency_lies_over_black():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[...] = [200, 100, 50, 0]
    rgba[0, 0, 3], rgba[0, 1, 3] = 255, 128
    loaded = np.asarray(load_image(encode(Image.fromarray(rgba))))
    np.testing.assert_array_equal(loaded[1], 0)
    np.testing.assert_array_equal(loaded[0, 0], [200, 100, 50])
    # 128/255 of the colour, to one level of rounding.
    assert np.abs(loaded[0, 1].astype(int) - [100, 50, 25]).max() <= 1


def test_palette_transparency_lies_over_black():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 210, 220])
    palette.putdata([0, 1])
    loaded = np.asarray(load_image(encode(palette, transparency=1)))
    np.testing.assert_array_equal(loaded[0], [[10, 20, 30], [0, 0, 0]])


def test_sixteen_bit_grey_is_scaled():
    grey = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    loaded = np.asarray(load_image(encode(Image.fromarray(grey))))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 1, 128, 255])


def test_exif_orientation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left
    loaded = load_image(encode(picture, exif=exif))
    np.testing.assert_array_equal(np.asarray(loaded), np.rot90(np.asarray(picture), -1))


OTHER_FILES = {
    "empty": b"",
    "text": b"not an image",
    "array": b"\x93NUMPY",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "gif": encode(Image.new("P", (4, 4)), "GIF"),
    "tiff": encode(Image.new("L", (4, 4)), "TIFF"),
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files(tmp_path, content):
    file = tmp_path / "image.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not an image") as error:
        load_image(file)
    assert str(error.value).startswith(str(file))


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "\0.png"):
        with pytest.raises(InputError, match="cannot be read"):
            load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(picture, kind, part):
    content = encode(picture, kind)
    with pytest.raises(InputError, match=r"damaged or truncated|not an image"):
        load_image(content[: int(len(content) * part)])


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 8_001), (12_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_from_the_header(size):
    with pytest.raises(InputError, match="more than 80,000,000 pixels"):
        load_image(_png_header(*size))


def test_a_file_too_large_is_refused_unread(tmp_path):
    file = tmp_path / "image.png"
    with file.open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(InputError, match="bytes is more than"):
        load_image(file)


@given(KINDS, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_images_never_raise_anything_else(kind, changes):
    content = bytearray(encode(Image.linear_gradient("L").resize((16, 16)).convert("RGB"), kind))
    for position, value in changes:
        content[position % len(content)] = value
    try:
        loaded = load_image(bytes(content))
    except InputError as error:
        assert str(error).startswith("the image: ")
    else:
        assert loaded.mode == "RGB"


def test_geometry_of_the_demo_image():
    geometry = resize_crop_geometry(1691, 930, 704, 1280)
    assert (geometry.source, geometry.resized, geometry.offset) == ((1691, 930), (1280, 704), (0, 0))
    geometry = resize_crop_geometry(1672, 941, 704, 1280)
    assert (geometry.resized, geometry.offset) == ((1280, 720), (0, 8))
    geometry = resize_crop_geometry(1000, 300, 704, 1280)
    assert (geometry.resized, geometry.offset) == ((2347, 704), (533, 0))


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 800), st.integers(1, 1300))
def test_geometry_covers_the_target_and_keeps_the_aspect(source_width, source_height, height, width):
    try:
        geometry = resize_crop_geometry(source_width, source_height, height, width)
    except InputError:
        scale = max(height / source_height, width / source_width)
        # Both sides round by at most half a pixel.
        assert (source_width * scale + 1) * (source_height * scale + 1) > MAX_PIXELS
        return
    (rw, rh), (left, top) = geometry.resized, geometry.offset
    assert rw >= width and rh >= height and (rw == width or rh == height)
    assert 0 <= left <= rw - width and 0 <= top <= rh - height
    assert abs((rw - width) - 2 * left) <= 1 and abs((rh - height) - 2 * top) <= 1
    scale = max(height / source_height, width / source_width)
    # Rounded to whole pixels, and never below the target.
    assert abs(rw - source_width * scale) <= 0.5 + 1e-9 * rw and abs(rh - source_height * scale) <= 0.5 + 1e-9 * rh


@given(st.integers(1, 60), st.integers(1, 60))
def test_resize_and_crop_returns_the_target(source_width, source_height):
    result, geometry = resize_and_crop(Image.new("RGB", (source_width, source_height), (7, 8, 9)), 24, 40)
    assert result.shape == (24, 40, 3) and result.dtype == np.uint8 and geometry.source == (source_width, source_height)
    np.testing.assert_array_equal(result.reshape(-1, 3), np.tile([7, 8, 9], (960, 1)))


def test_an_image_of_the_target_size_is_untouched(picture):
    result, _ = resize_and_crop(picture, 30, 50)
    np.testing.assert_array_equal(result, np.asarray(picture))
    result[:] = 0
    assert np.asarray(picture).any()


def test_arrays_are_accepted(picture):
    for a, b in zip(resize_and_crop(np.asarray(picture), 20, 20), resize_and_crop(picture, 20, 20)):
        np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else None
        assert type(a) is type(b)
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"uint8 \(H, W, 3\)"):
            resize_and_crop(bad, 20, 20)  # type: ignore[arg-type]


def test_too_elongated():
    with pytest.raises(InputError, match="1x10000 is too elongated to fill 1280x704"):
        resize_and_crop(Image.new("RGB", (1, 10_000)), 704, 1280)


def test_model_range():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image[0, 1] = [10, 20, 30]
    result = to_model_range(image)
    assert result.dtype == np.float32 and result.shape == (1, 3, 1, 16, 16) and result.flags.c_contiguous
    assert result.min() == -1 and result.max() == 1
    # float32 division and one product: half a unit in the last place each.
    np.testing.assert_allclose(result[0, :, 0, 0, 1], np.array([10, 20, 30]) / 127.5 - 1, atol=1.2e-7)
    back = np.clip((result + 1) * 127.5, 0, 255).round().astype(np.uint8)
    np.testing.assert_array_equal(back[0, :, 0].transpose(1, 2, 0), image)
    for bad in (image.astype(np.float32), image[..., 0]):
        with pytest.raises(InputError, match=r"expected uint8 \(H, W, 3\)"):
            to_model_range(bad)  # type: ignore[arg-type]

"""Opening a bundle and starting streams on it: what is accepted, and what is refused before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm.camera import default_intrinsics
from sanawm.config import tiny_config
from sanawm.errors import BundleError, CameraError, InputError, UserError
from sanawm.programs import programs
from sanawm_runtime import World


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A landscape of smooth colours, wider than the model's frame."""
    y, x = np.mgrid[0:120, 0:260] / 260
    return (255 * np.stack([x, 0.5 + 0.5 * np.sin(9 * y), 1 - x * y], -1)).astype(np.uint8)


def test_opened(tiny_world: World, tiny_bundle: Path) -> None:
    config = tiny_config()
    assert tiny_world.config.dit == config.dit and tiny_world.image_size == (192, 320)
    assert tiny_world.geometry.first_frames == 4 and tiny_world.geometry.dtype == "float32"
    assert tiny_world.programs == programs(tiny_world.geometry)
    assert tiny_world.bundle.root == tiny_bundle and tiny_world.bundle.verify().ok


def test_every_form_of_image_is_the_same_frame(tiny_world: World, photo: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(photo)
    picture.save(tmp_path / "first.png")
    forms: list[Any] = [photo, picture, tmp_path / "first.png", str(tmp_path / "first.png"), (tmp_path / "first.png").read_bytes()]
    streams = [tiny_world.start(form, "a field") for form in forms]
    expected = np.asarray(picture.resize((416, 192), Image.Resampling.LANCZOS).crop((48, 0, 368, 192)))
    for stream in streams:
        np.testing.assert_array_equal(stream.first_frame, expected)


def test_every_form_of_intrinsics_is_the_same(tiny_world: World, photo: np.ndarray, tmp_path: Path) -> None:
    _, geometry = tiny_world.prepare_image(photo)
    row = np.array([200.0, 210.0, 130.0, 60.0])
    matrix = np.array([[200.0, 0, 130], [0, 210, 60], [0, 0, 1]])
    np.save(tmp_path / "k.npy", matrix)
    forms: list[Any] = [row, matrix, np.tile(row, (5, 1)), np.tile(matrix, (5, 1, 1)), "200,210,130,60", tmp_path / "k.npy"]
    # 120 rows become 192, the 416 columns lose 48 on each side.
    expected = np.tile([320.0, 336.0, 160.0, 96.0], (5, 1))
    for form in forms:
        np.testing.assert_allclose(tiny_world.input_intrinsics(form, geometry, 5), expected, rtol=1e-12)
    guessed = tiny_world.input_intrinsics(None, geometry, 1, 60.0)
    np.testing.assert_allclose(guessed[0, :2], default_intrinsics(260, 120, fov_degrees=60.0)[:2] * 1.6, rtol=1e-12)


def test_free_encoders(tiny_bundle: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with World.open(tiny_bundle, free_encoders=True) as world:
        unloaded: list[str] = []
        monkeypatch.setattr(world.engine, "unload", unloaded.append)
        first, second = (world.start(photo, "a field") for _ in range(2))
        assert set(unloaded) == {"text_encoder", "image_encoder"}
        np.testing.assert_array_equal(first.first_frame, second.first_frame)


def test_a_closed_world(tiny_bundle: Path, photo: np.ndarray) -> None:
    with World.open(tiny_bundle) as world:
        pass
    with pytest.raises(UserError, match="closed"):
        world.start(photo, "a field")


def test_warm_up_loads_everything(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with World.open(tiny_bundle) as world:
        loaded: list[str] = []
        monkeypatch.setattr(world.engine, "load", loaded.append)
        world.warm_up()
        assert loaded == list(world.programs)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"GIF89a not an image", "not an image"),
        (b"", "not an image"),
        ("no/such/picture.png", "cannot be read"),
        (np.zeros((192, 320, 3), np.float32), r"expected an RGB image as uint8 \(H, W, 3\), found float32"),
        (np.zeros((192, 320), np.uint8), "expected an RGB image"),
        (np.zeros((0, 320, 3), np.uint8), "expected an RGB image"),
    ],
)
def test_images_that_are_none(image: Any, message: str, tiny_world: World) -> None:
    with pytest.raises(InputError, match=message):
        tiny_world.start(image, "a field")


def test_a_truncated_image(tiny_world: World, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "first.png")
    data = (tmp_path / "first.png").read_bytes()
    with pytest.raises(InputError, match="damaged or truncated"):
        tiny_world.start(data[: len(data) // 2], "a field")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed: int, tiny_world: World, photo: np.ndarray) -> None:
    with pytest.raises(InputError, match=rf"expected a seed from 0 to 2\*\*64 - 1, found {seed}"):
        tiny_world.start(photo, "a field", seed=seed)


def test_a_prompt_that_is_too_long(tiny_world: World, photo: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"the prompt is \d+ tokens long and at most \d+ fit; shorten it"):
        tiny_world.start(photo, "word " * 2000)
    with pytest.raises(InputError, match="not valid text at character 3"):
        tiny_world.start(photo, "ab\udc80")


@pytest.mark.parametrize(
    "intrinsics",
    ["200,200,100", "a,b,c,d", np.zeros(5), np.array([0.0, 200, 100, 60]), np.array([np.nan, 200, 100, 60]), "missing.npy"],
    ids=["three", "words", "five", "zero", "nan", "missing"],
)
def test_intrinsics_that_cannot_be(intrinsics: Any, tiny_world: World, photo: np.ndarray) -> None:
    with pytest.raises(CameraError):
        tiny_world.start(photo, "a field", intrinsics=intrinsics)


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """damaged(edit): a copy of the tiny bundle whose manifest `edit` changed. Its files are links to the originals."""

    def make(edit: Callable[[dict[str, Any]], Any]) -> Path:
        copy = tmp_path / "bundle"
        shutil.copytree(tiny_bundle, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        edit(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    return make


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["programs"].pop("commit_steady"), "program commit_steady is missing or has another signature; rebuild it"),
        (lambda m: m["programs"].pop("denoise_first"), "program denoise_first is missing"),
        (lambda m: m["programs"]["decode"]["outputs"][0].update(name="pixels"), "program decode is missing or has another signature"),
        (lambda m: m["programs"]["denoise_second"]["inputs"][0].update(dtype="bfloat16"), "program denoise_second is missing or has another"),
        (lambda m: m["programs"]["camera"]["inputs"][0].update(shape=[1, 4, 20]), "program camera is missing or has another signature"),
        (lambda m: m["config"]["dit"].update(camera_conv_tail=False), "is missing or has another signature"),
        (lambda m: m["programs"]["text_encoder"]["extras"].pop("tokenizer"), "its tokenizer cannot be used"),
        (lambda m: m["programs"]["text_encoder"]["extras"].update(tokenizer="programs/decode.onnx"), "its tokenizer cannot be used"),
        (lambda m: m["programs"]["text_encoder"]["extras"].update(tokenizer="../../etc/passwd"), r"\.\./\.\./etc/passwd"),
        (lambda m: m["target"].update(name="rtx5090", capability="sm_120"), r"this bundle is for rtx5090 \(sm_120\)"),
        (lambda m: m.update(schema_version=99), "99"),
    ],
)
def test_bundles_that_do_not_fit(edit: Callable[[dict[str, Any]], Any], message: str, damaged: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=message):
        World.open(damaged(edit))


def test_another_window_is_refused(damaged: Callable[..., Path]) -> None:
    """The programs were compiled for the first and the previous chunk; a manifest that says otherwise would be obeyed silently."""
    with pytest.raises(UserError, match="compiled programs attend to the first and the previous chunk"):
        World.open(damaged(lambda m: m["config"]["stream"].update(sink=False)))


def test_a_flipped_byte_is_found_before_it_is_used(damaged: Callable[..., Path], photo: np.ndarray) -> None:
    copy = damaged(lambda m: None)
    path = copy / "programs" / "vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"programs/vae\.safetensors has SHA-256"):
        World.open(copy, verify="full")
    with World.open(copy) as world, pytest.raises(BundleError, match=r"programs/vae\.safetensors has SHA-256"):
        world.start(photo, "a field")

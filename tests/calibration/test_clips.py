"""Calibration sets: manifests, folders, and the generated one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm.camera import check_poses
from sanawm_calibration.clips import open_set
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.generated import MOTIONS, generated_set
from sanawm_calibration.scenes import SCENES, draw


def picture(path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png")
    np.save(tmp_path / "poses.npy", np.repeat(np.eye(4)[None], 80, 0))
    return tmp_path


def manifest(folder: Path, *clips: dict[str, object]) -> Path:
    path = folder / "set.json"
    path.write_text(json.dumps({"clip": list(clips)}))
    return path


GOOD = {"image": "a.png", "prompt": "a place", "poses": "poses.npy"}


def test_manifest_of_poses_and_actions(folder: Path) -> None:
    path = folder / "set.toml"
    path.write_text(
        '[[clip]]\nname = "first"\nimage = "a.png"\nprompt = "a place"\nposes = "poses.npy"\nintrinsics = [30, 30, 15, 10]\nseed = 5\n'
        '[[clip]]\nimage = "a.png"\nprompt = "another"\nactions = "w-30,d-30"\n'
    )
    first, second = open_set(path)
    assert (first.name, first.seed, first.frames) == ("first", 5, 73)
    assert first.intrinsics is not None and first.intrinsics.shape == (73, 4)
    assert (second.name, second.seed, second.frames, second.intrinsics) == ("clip-002", 42, 49, None)
    assert first.image().shape == (20, 30, 3)
    assert first.digest() == open_set(path)[0].digest() != second.digest()
    assert first.limited(49).frames == 49 and first.limited(49).digest() != first.digest()
    assert first.limited(999) is first


def test_folder_of_clips(tmp_path: Path) -> None:
    for name, camera in (("one", "poses.npy"), ("two", "actions.txt")):
        clip = tmp_path / name
        clip.mkdir()
        picture(clip / "image.jpg")
        (clip / "prompt.txt").write_text("a place\n")
        if camera == "poses.npy":
            np.save(clip / camera, np.repeat(np.eye(4)[None], 25, 0))
        else:
            (clip / camera).write_text("w-24")
    one, two = open_set(tmp_path)
    assert (one.name, two.name, one.prompt, two.frames) == ("one", "two", "a place", 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "b.png"}, "b.png: cannot be read"),
        ({"poses": "none.npy"}, "none.npy: cannot be read"),
        ({"actions": "w-24"}, "either poses or actions"),
        ({"poses": None}, "either poses or actions"),
        ({"prompt": 3}, "expected prompt to be given"),
        ({"seed": -1}, "expected seed"),
        ({"intrinsics": [1, 2]}, "expected shape"),
        ({"speed": 2}, "unknown settings speed"),
    ],
)
def test_mistakes_name_the_clip(folder: Path, change: dict[str, object], message: str) -> None:
    clip = {k: v for k, v in (GOOD | change).items() if v is not None}
    with pytest.raises(CalibrationError, match=message) as caught:
        open_set(manifest(folder, GOOD | {"name": "fine"}, clip))
    assert "clip 2" in str(caught.value)


def test_other_mistakes(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="appears twice"):
        open_set(manifest(folder, GOOD | {"name": "x"}, GOOD | {"name": "x"}))
    with pytest.raises(CalibrationError, match="clip 1: the poses are too few|at least 25 frames"):
        np.save(folder / "poses.npy", np.eye(4)[None])
        open_set(manifest(folder, GOOD))
    with pytest.raises(CalibrationError, match="no such calibration set"):
        open_set(folder / "nothing")
    (folder / "bad.toml").write_text("clip = 3")
    with pytest.raises(CalibrationError, match=r"expected a list of \[\[clip\]\]"):
        open_set(folder / "bad.toml")
    (folder / "bad.toml").write_text("= 3")
    with pytest.raises(CalibrationError, match="not a readable TOML"):
        open_set(folder / "bad.toml")
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(CalibrationError, match="subfolder for each clip"):
        open_set(empty)
    (empty / "one").mkdir()
    with pytest.raises(CalibrationError, match="expected one file image"):
        open_set(empty)


def test_the_generated_set_is_stratified_and_reaches_the_steady_window() -> None:
    clips = generated_set(16, 8, (64, 48))
    assert len(clips) == 16 and len({clip.name for clip in clips}) == 16 and len({clip.seed for clip in clips}) == 16
    assert {clip.motion for clip in clips} == {motion.name for motion in MOTIONS}
    assert len({clip.image().tobytes() for clip in clips}) == 16
    for clip in clips:
        # 3 + 1 latent frames first, then 3 a chunk: 8 chunks, of which the third and later see the steady window.
        assert clip.frames == 193
        check_poses(clip.poses)
        assert np.array_equal(clip.poses[0], np.eye(4))
    by = {clip.motion: clip.poses for clip in clips}

    def turned(motion: str) -> float:
        return float(np.arccos(np.clip((np.trace(by[motion][96, :3, :3]) - 1) / 2, -1, 1)))

    assert not by["still"][-1, :3, 3].any()
    assert by["forward"][-1, 2, 3] > 4 and abs(by["strafe"][-1, 0, 3]) > 4
    assert 0 < turned("slow yaw") < turned("fast yaw") and turned("pitch") > 0.3 and np.linalg.norm(by["mixed"][-1, :3, 3]) > 0.3


def test_prompts_are_shortened_until_they_fit() -> None:
    clips = generated_set(3, 1, (64, 48), fits=lambda prompt: len(prompt.split()) <= 4)
    assert [len(clip.prompt.split()) for clip in clips] == [4, 4, 4]


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.name)
def test_scenes_are_pictures_with_contrast_and_repeatable(scene: object) -> None:
    name = scene.name  # type: ignore[attr-defined]
    image = draw(name, 96, 54, 3)
    assert image.shape == (54, 96, 3) and image.dtype == np.uint8
    assert np.array_equal(image, draw(name, 96, 54, 3)) and not np.array_equal(image, draw(name, 96, 54, 4))
    assert image.std() > 8

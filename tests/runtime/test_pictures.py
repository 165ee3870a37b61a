"""The pictures of a run, checked by what can be measured in them."""

import errno
import os
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image, ImageFont

from sanawm.errors import InputError
from sanawm_runtime import pictures
from sanawm_runtime.camera_plot import _spread
from sanawm_runtime.canvas import Canvas, nice_step, number

INTRINSICS = np.array([160.0, 160.0, 160.0, 96.0])  # a right angle across


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def near(image, colour, tolerance=3) -> np.ndarray:
    """Where a picture has a colour."""
    return (np.abs(pixels(image) - np.array(colour)) <= tolerance).all(-1)


def poses(count=49, x=0.0, y=0.0, z=0.0) -> np.ndarray:
    """Cameras that look along z and move by (x, y, z) in all."""
    c2w = np.tile(np.eye(4), (count, 1, 1))
    c2w[:, :3, 3] = np.linspace(0, 1, count)[:, None] * [x, y, z]
    return c2w


def yaw(degrees: float) -> np.ndarray:
    """A rotation that turns the camera to the right."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


@pytest.fixture
def written(monkeypatch):
    """Every line of text that is drawn, with its places."""
    texts = defaultdict(list)
    original = Canvas.text

    def record(self, at, words, *rest, **options):
        texts[words].append(at)
        original(self, at, words, *rest, **options)

    monkeypatch.setattr(Canvas, "text", record)
    return texts


FIRST, STEADY = {"frames": 25, "stages": {"denoise": 1.0, "decode": 0.5}}, {"frames": 24, "stages": {"denoise": 0.5, "decode": 0.25}}
TIMING = {"fps": 16, "first_frame_s": 0.9, "chunks": [FIRST, STEADY, STEADY, STEADY, STEADY]}


def test_contact_sheet_places_frames_in_rows():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    sheet = pictures.contact_sheet([np.full((36, 64, 3), colour, np.uint8) for colour in colours], 3)
    assert sheet.mode == "RGB" and sheet.width == 1840
    centres = []
    for colour in colours:
        rows, columns = np.nonzero(near(sheet, colour, 0))
        centres.append((rows.mean(), columns.mean()))
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        # Whole pixels on both sides.
        assert abs(width / height - 64 / 36) < 0.02
        # Full but for the rounded corners.
        assert 0.99 < len(rows) / (width * height) < 1.0
    (a, b, c, d, e) = centres
    assert a[0] == b[0] == c[0] < d[0] == e[0] and a[1] < b[1] < c[1] and a[1] == d[1] and b[1] == e[1]


def test_contact_sheet_writes_captions_under_their_frames(written):
    frames = [np.zeros((36, 64, 3), np.uint8)] * 4
    plain = pictures.contact_sheet(frames, 2)
    sheet = pictures.contact_sheet(frames, 2, ["one", "two", "three", "four"], title="Title")
    assert sheet.height > plain.height
    (title,), (one,), (two,), (three,) = (written[word] for word in ("Title", "one", "two", "three"))
    assert title[1] < one[1] == two[1] < three[1] and one[0] == three[0] < two[0]


@pytest.mark.parametrize(
    ("frames", "columns", "captions"),
    [
        ([], 2, None),
        ([np.zeros((4, 4, 3), np.uint8)], 0, None),
        ([np.zeros((4, 4, 3), np.uint8)], 1, ["a", "b"]),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], 1, None),
        ([np.zeros((4, 4, 3), np.float32)], 1, None),
        ([np.zeros((4, 4), np.uint8)], 1, None),
    ],
)
def test_contact_sheet_refuses_what_does_not_fit(frames, columns, captions):
    with pytest.raises(ValueError, match="expected frames"):
        pictures.contact_sheet(frames, columns, captions)


def test_timeline_bars_are_as_high_as_their_times():
    image = pictures.timeline_plot(TIMING)
    body = near(image, pictures._STAGE_COLOURS["denoise"])[200:], near(image, pictures._STAGE_COLOURS["decode"])[200:]
    heights = []
    for stage in body:
        columns = np.nonzero(stage.any(0))[0]
        bars = np.split(columns, np.nonzero(np.diff(columns) > 1)[0] + 1)
        assert len(bars) == 5
        # The extent, because the line of real time may cross a bar.
        heights.append([np.ptp(np.nonzero(stage[:, bar].any(1))[0]) + 1 for bar in bars])
    denoise, decode = np.array(heights)
    # Edges lie on whole samples, a third of a pixel, and blended edge pixels do not count.
    assert np.abs(denoise[0] - 2 * denoise[1:]).max() <= 4 and np.abs(denoise - 2 * decode).max() <= 4
    assert denoise[0] > 200


def test_timeline_line_is_the_playback_time(written):
    image = pixels(pictures.timeline_plot(TIMING))
    dark = (image[200:, 400:] < 60).all(-1).sum(1)  # right of the first chunk
    line = 200 + int(np.argmax(dark))
    expected = 2 * written["1.5"][0][1]
    assert dark.max() > 400 and abs(line - expected) <= 2  # 24 frames at 16 fps are 1.5 s; the line is three pixels thick
    facts = ["5 chunks", "7.6 s of video in 4.5 s", "median 0.75 s a chunk, 2x real time", "first frame after 0.90 s"]
    assert "   \u00b7   ".join(facts) in written


def test_timeline_of_a_long_stream_averages(written):
    timing = {"fps": 16, "chunks": [{"frames": 24, "stages": {"denoise": 0.5}}] * 1000}
    assert pictures.timeline_plot(timing).width == 1840
    assert "chunk (each bar is the mean of 5)" in written and {"0", "100", "900"} <= set(written)


def test_timeline_gives_unknown_stages_their_own_colours():
    names = [*pictures._STAGE_COLOURS, "refine", "encode", "a", "b", "c", "d"]
    colours = pictures._stage_colours(names)
    assert len({colours[name] for name in names[:9]}) == 9 and set(colours) == set(names)


def test_timeline_without_chunks():
    with pytest.raises(ValueError, match="at least one chunk"):
        pictures.timeline_plot({"fps": 16, "chunks": []})


def marker(image, colour) -> tuple[float, float]:
    """Centre (x, y) of the largest disc of a colour in the map."""
    rows, columns = np.nonzero(near(image, colour, 2)[: 2 * 542])
    return float(np.median(columns)), float(np.median(rows))


END = (240, 145, 50)


@pytest.mark.parametrize(("x", "z"), [(4.0, 0.0), (-4.0, 0.0), (0.0, 4.0), (0.0, -4.0), (3.0, 2.0)])
def test_camera_path_right_is_right_and_forward_is_up(written, x, z):
    image = pictures.camera_path_plot(poses(x=x, z=z), INTRINSICS)
    end_x, end_y = marker(image, END)
    # Grid labels give the scale: 1 unit between their places, y down in the picture.
    across = sorted((float(label), place[0]) for label, places in written.items() for place in places if place[1] == 550)
    (low, low_x), *_, (high, high_x) = across
    unit = 2 * (high_x - low_x) / (high - low)
    middle_x, middle_y = 72 + 892, 82 + 542  # centre of the map, in pixels
    assert abs(end_x - middle_x - x / 2 * unit) < 4 and abs(end_y - middle_y + z / 2 * unit) < 4  # a few pixels of marker rim


def test_camera_field_of_view_opens_where_the_camera_looks():
    for degrees, side in ((90, 1), (-90, -1)):
        c2w = poses()
        c2w[:, :3, :3] = yaw(degrees)
        image = pixels(pictures.camera_path_plot(c2w, INTRINSICS))[180:1060, 160:1760]
        tinted = np.abs(image - [247, 248, 250]).max(-1) > 8
        tinted &= image[..., 2] - image[..., 0] > 15  # the blue of the first frame
        columns = np.nonzero(tinted)[1] + 160 - (72 + 892)
        assert np.sign(np.median(columns)) == side and np.abs(columns).max() > 100


def test_camera_height_and_pitch_are_up(monkeypatch):
    curves = {}
    original = Canvas.line

    def record(self, points, colour, width=1.0):
        curves.setdefault(width, []).append(points)
        original(self, points, colour, width)

    monkeypatch.setattr(Canvas, "line", record)
    c2w = poses(y=-1.0)  # y is down: the camera rises
    for frame, angle in enumerate(np.radians(np.linspace(0, 20, len(c2w)))):  # and looks up more and more
        c2w[frame, :3, :3] = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    pictures.camera_path_plot(c2w, INTRINSICS)
    strips = [segment for segment in curves[2.0] if len(segment) == 2]
    height, pitch = strips[:48], strips[48:]
    for strip in (height, pitch):
        assert len(strip) == 48 and all(second[1] < first[1] and second[0] > first[0] for first, second in strip)


def test_camera_facts(written):
    c2w = poses(z=3.0)
    for frame in range(len(c2w)):
        c2w[frame, :3, :3] = yaw(90 * frame / 48)
    pictures.camera_path_plot(c2w, INTRINSICS, fps=16, title="A walk")
    assert "A walk" in written
    facts = ["49 frames, 3.1 s at 16 fps", "path 3 units", "turned 90\u00b0 in all", "horizontal field of view 90\u00b0"]
    assert "   \u00b7   ".join(facts) in written
    assert "start" in written and "end" in written


@pytest.mark.parametrize("count", [1, 2, 49])
def test_a_camera_that_stays(written, count):
    assert pictures.camera_path_plot(poses(count), np.tile(INTRINSICS, (count, 1))).size[0] == 1840
    assert "start, end" in written


def test_a_very_long_path_does_not_cost_more(written):
    assert pictures.camera_path_plot(poses(100_000, x=1e4), INTRINSICS).width == 1840
    assert any(label.startswith("100000 frames, 6250.0 s") for label in written)


@pytest.mark.parametrize(
    ("c2w", "intrinsics"),
    [
        (np.eye(4), INTRINSICS),
        (np.zeros((0, 4, 4)), INTRINSICS),
        (np.full((3, 4, 4), np.nan), INTRINSICS),
        (poses(3), np.zeros((2, 4))),
        (poses(3), np.array([0.0, 1, 1, 1])),
    ],
)
def test_camera_path_refuses_bad_input(c2w, intrinsics):
    with pytest.raises(ValueError, match="expected"):
        pictures.camera_path_plot(c2w, intrinsics)


def test_views_are_spread_over_motion_and_turning():
    still = np.zeros((100, 2)), np.tile([0.0, 0, 1], (100, 1))
    assert _spread(*still) == [0]
    late = np.zeros((100, 2))
    late[50:, 0] = np.linspace(0, 460, 50)  # ten steps of 46 units
    frames = _spread(late, still[1])
    assert frames[-1] == 99 and len(frames) in (11, 12) and sum(frame < 49 for frame in frames) == 1


def test_every_letter_is_in_the_font(written):
    pictures.timeline_plot(TIMING)
    pictures.camera_path_plot(poses(x=-2.5, z=1.0), INTRINSICS)
    pictures.contact_sheet([np.zeros((4, 8, 3), np.uint8)], 1, ["frame 8 \u00b7 0.5 s"])
    font = ImageFont.load_default(size=24)
    missing = bytes(font.getmask("\uffff"))
    letters = set("".join(written)) - {" "}
    assert len(letters) > 30 and [letter for letter in sorted(letters) if bytes(font.getmask(letter)) == missing] == []


def test_pictures_are_the_same_each_time():
    first, second = (pictures.camera_path_plot(poses(x=2, z=1), INTRINSICS).tobytes() for _ in range(2))
    assert first == second


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    image = pictures.timeline_plot(TIMING)
    pictures.save_picture(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as again:
        np.testing.assert_array_equal(pixels(again), pixels(image))
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.png: No space left on device"):
        pictures.save_picture(image, tmp_path / "a.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before
    with pytest.raises(InputError, match="No such file or directory"):
        pictures.save_picture(image, tmp_path / "missing" / "a.png")


def test_tick_steps_and_labels():
    assert [nice_step(span, 5) for span in (1.0, 7.3, 0.04, 5000, 0.0)] == pytest.approx([0.2, 2, 0.01, 1000, 2e-10])
    assert [number(*case) for case in ((0.5, 0.5), (-0.0, 0.5), (-1e-9, 0.1), (3, 1), (1200, 200), (-0.25, 0.05))] == [
        "0.5",
        "0.0",
        "0.0",
        "3",
        "1200",
        "-0.25",
    ]

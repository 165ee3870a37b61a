"""The mp4 that grows, PNG frames, latents, and the choice between them."""

import contextlib
import errno
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from sanawm.errors import EngineError, InputError
from sanawm_runtime.video import LatentWriter, Mp4Writer, PngWriter, open_writer, probe_video

H, W = 64, 96


def moving(count: int, start: int = 0) -> np.ndarray:
    """Smooth frames that all differ: a gradient that slides, over a colour that changes. (count, H, W, 3) uint8."""
    y, x = np.mgrid[:H, :W]
    frames = [np.stack([(x + 4 * i) % 192 + 32, y + 2 * i % 128, np.full((H, W), (9 * i) % 256)], -1) for i in range(start, start + count)]
    return np.array(frames, np.uint8)


def decode(path) -> np.ndarray:
    with av.open(os.fspath(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def test_the_file_on_disk_is_a_whole_video_after_every_chunk(tmp_path):
    path = tmp_path / "out.mp4"
    parts = [moving(17), moving(24, 17), moving(8, 41), moving(1, 49), moving(24, 50)]
    with Mp4Writer(path, 16, H, W) as writer:
        assert not path.exists()
        for count in range(1, len(parts) + 1):
            writer.append(parts[count - 1])
            expected = np.concatenate(parts[:count])
            shown = decode(path)
            assert shown.shape == expected.shape and writer.frames == len(expected)
            # 43 to 46 dB measured (crf 18, half-resolution chroma); a frame one step early or late comes to 32 dB.
            assert min(psnr(a, b) for a, b in zip(shown, expected)) > 40
    assert probe_video(path) == {"frames": 74, "width": W, "height": H, "fps": 16.0, "duration": 74 / 16}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


def test_every_chunk_starts_with_a_keyframe_and_time_runs_on(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
        for start, count in ((0, 17), (17, 24), (41, 24)):
            writer.append(moving(count, start))
    with av.open(tmp_path / "out.mp4") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 17, 41]
        assert [packet.pts * packet.time_base * 16 for packet in packets] == list(range(65))
        assert all(packet.pts == packet.dts for packet in packets)


def test_chunks_that_are_encoded_side_by_side_come_in_order(tmp_path):
    parts = [moving(17), moving(24, 17), moving(8, 41), moving(1, 49), moving(24, 50)]
    for name in ("a.mp4", "b.mp4"):
        with Mp4Writer(tmp_path / name, 16, H, W, lanes=3) as writer:
            for write in [writer.begin(part) for part in parts]:
                write()
    shown = decode(tmp_path / "a.mp4")
    assert len(shown) == 74 and min(psnr(a, b) for a, b in zip(shown, np.concatenate(parts))) > 40  # as above
    with av.open(tmp_path / "a.mp4") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    # The first chunk is cut into a part for each encoder.
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 6, 12, 17, 41, 49, 50]
    assert [packet.pts * packet.time_base * 16 for packet in packets] == list(range(74))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failure_leaves_out_all_that_was_begun_after_it(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No space left.*the 9 frames before are kept"), Mp4Writer(tmp_path / "out.mp4", 16, H, W, lanes=2) as writer:
        writes = [writer.begin(moving(count, start)) for start, count in ((0, 9), (9, 8), (17, 8))]
        writes[0]()
        with monkeypatch.context() as patch:
            patch.setattr("sanawm_runtime.video._write_all", full)
            try:
                writes[1]()
            finally:
                with pytest.raises(ValueError, match="closed"):
                    writes[2]()
    assert len(decode(tmp_path / "out.mp4")) == 9


def full(file, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_player_can_seek(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
        for chunk in range(4):
            writer.append(moving(16, 16 * chunk))
    with av.open(tmp_path / "out.mp4") as container:
        container.seek(2 * av.time_base + 1000)
        frame = next(container.decode(video=0))
        assert frame.time == 2.0 and psnr(frame.to_ndarray(format="rgb24"), moving(1, 32)[0]) > 40  # as above


# Y'CbCr of BT.709 in limited range, ITU-R BT.709-6 table 3 with 16 + 219 Y', 128 + 224 C.
@pytest.mark.parametrize(
    ("rgb", "ycc"),
    [
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
        ((255, 255, 255), (235, 128, 128)),
        ((0, 0, 0), (16, 128, 128)),
    ],
)
def test_colours_are_bt709_and_say_so(tmp_path, rgb, ycc):
    with Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
        writer.append(np.broadcast_to(np.array(rgb, np.uint8), (2, H, W, 3)))
    with av.open(tmp_path / "out.mp4") as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p" and context.name == "h264"
        planes = next(container.decode(video=0)).to_ndarray()
    quarter = H // 4
    found = (planes[:H].mean(), planes[H : H + quarter].mean(), planes[H + quarter :].mean())
    # One step for rounding in the matrix and one for the quantizer; BT.601 would put red's luma at 81.
    assert np.abs(np.subtract(found, ycc)).max() <= 2


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        with Mp4Writer(tmp_path / name, 16, H, W) as writer:
            writer.append(moving(9))
            writer.append(moving(8, 9))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failure_before_the_first_chunk_leaves_what_was_there(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name in ("old.mp4", "new.mp4"):
        with pytest.raises(ZeroDivisionError), Mp4Writer(tmp_path / name, 16, H, W):
            raise ZeroDivisionError
    with Mp4Writer(tmp_path / "new.mp4", 16, H, W) as writer:
        writer.append(moving(1)[:0])
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.mp4"] and (tmp_path / "old.mp4").read_bytes() == b"old"


def test_an_interruption_keeps_the_whole_chunks(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"

    def interrupted(file, data):
        file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Mp4Writer(path, 16, H, W) as writer:
        writer.append(moving(9))
        size = path.stat().st_size
        monkeypatch.setattr("sanawm_runtime.video._write_all", interrupted)
        writer.append(moving(8, 9))
    assert path.stat().st_size == size and len(decode(path)) == 9
    with pytest.raises(ValueError, match="closed"):
        writer.append(moving(1))


@pytest.mark.parametrize("after", [0, 1])
def test_an_interruption_of_the_first_chunk_leaves_nothing_or_all_of_it(tmp_path, monkeypatch, after):
    real = os.replace

    def interrupted(source, target):
        if after:
            real(source, target)
        monkeypatch.setattr(os, "replace", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
        writer.append(moving(9))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"] and len(decode(tmp_path / "out.mp4")) == 9


GROW = """
import sys
import numpy as np
from sanawm_runtime.video import Mp4Writer
writer = Mp4Writer(sys.argv[1], 16, 64, 96)
for chunk in range(10**6):
    writer.append(np.full((8, 64, 96, 3), chunk % 200, np.uint8))
    print(chunk, flush=True)
"""


def test_a_killed_process_leaves_a_video(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", GROW, str(tmp_path / "out.mp4")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(12):
        child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    shown = []
    with av.open(os.fspath(tmp_path / "out.mp4")) as container, contextlib.suppress(av.error.FFmpegError):
        # The kill may have cut the fragment that was being written; what is before it plays.
        shown.extend(frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0))
    assert len(shown) >= 12 * 8
    # One grey level for limited range and back, and one for the quantizer.
    assert np.abs(np.array(shown[: 12 * 8]) - np.repeat(np.arange(12), 8)).max() <= 2


LIMITED = """
import resource, signal, sys
import numpy as np
from sanawm.errors import InputError
from sanawm_runtime.video import open_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
noise = np.random.default_rng(0)
try:
    with open_writer(sys.argv[1], fps=16, height=64, width=96) as writer:
        for _ in range(100):
            if writer.takes == "latents":
                writer.append(np.zeros((16, 3, 6, 10), np.float32))
            else:
                writer.append(noise.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8))
except InputError as error:
    print(error)
"""


def run_limited(path) -> str:
    return subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True).stdout


def test_a_full_disk_keeps_the_video_so_far(tmp_path):
    message = run_limited(tmp_path / "out.mp4")
    frames = probe_video(tmp_path / "out.mp4")["frames"]
    assert frames > 0 and len(decode(tmp_path / "out.mp4")) == frames
    assert "File too large; free space or choose another place" in message and f"the {frames} frames before are kept" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


def test_a_full_disk_leaves_no_half_latents(tmp_path):
    assert "File too large" in run_limited(tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_first_chunk_leaves_nothing(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sanawm_runtime.video._write_all", full)
    with pytest.raises(InputError, match=r"No space left on device; free space or choose another place$"):
        with Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
            writer.append(moving(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95), (0, 96)])
def test_odd_sizes(tmp_path, height, width):
    with pytest.raises(InputError, match=f"even number of rows and columns, found {height} x {width}"):
        Mp4Writer(tmp_path / "out.mp4", 16, height, width)


def test_encoders_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown video codec 'theora'; choose auto, libx264, h264_nvenc"):
        Mp4Writer(tmp_path / "out.mp4", 16, H, W, codec="theora")
    # An encoder that is compiled in but does not open stands for NVENC without an NVIDIA driver on every machine that runs this test.
    monkeypatch.setitem(sys.modules["sanawm_runtime.mp4"]._OPTIONS, "h264_nvenc", {"preset": "no such preset"})
    with pytest.raises(EngineError, match=r"the video encoder h264_nvenc does not start on this machine .*; use --codec auto"):
        Mp4Writer(tmp_path / "out.mp4", 16, H, W, codec="h264_nvenc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [moving(2)[:, :32], moving(2).astype(np.float32), moving(2)[0], moving(2)[..., :1]])
def test_frames_of_another_shape_or_type(tmp_path, bad):
    with Mp4Writer(tmp_path / "out.mp4", 16, H, W) as writer:
        with pytest.raises(ValueError, match="expected frames of dtype uint8 and shape"):
            writer.append(bad)


def test_png_frames(tmp_path):
    frames = moving(5)
    with PngWriter(tmp_path / "frames") as writer:
        writer.append(frames[:3])
        writer.append(frames[3:])
    names = sorted(entry.name for entry in (tmp_path / "frames").iterdir())
    assert names == [f"frame_{index:06d}.png" for index in range(5)] and writer.frames == 5
    for name, frame in zip(names, frames):
        with Image.open(tmp_path / "frames" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
    with pytest.raises(InputError, match="holds frames of another run"):
        PngWriter(tmp_path / "frames")


def test_latents(tmp_path):
    latents = np.random.default_rng(0).standard_normal((16, 8, 6, 10)).astype(np.float32)
    with LatentWriter(tmp_path / "z.npy") as writer:
        for chunk in np.split(latents, [2, 5], axis=1):
            writer.append(chunk)
            assert not (tmp_path / "z.npy").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy", allow_pickle=False), latents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["z.npy"]


def test_latents_are_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), LatentWriter(tmp_path / "z.npy") as writer:
        writer.append(np.zeros((4, 3, 2, 2), np.float16))
        raise ZeroDivisionError
    with LatentWriter(tmp_path / "z.npy"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_latents_that_do_not_fit(tmp_path):
    with LatentWriter(tmp_path / "z.npy") as writer:
        with pytest.raises(ValueError, match="expected latents of dtype"):
            writer.append(np.zeros((4, 3, 2)))
        writer.append(np.zeros((4, 3, 2, 2), np.float16))
        for bad in (np.zeros((4, 3, 2, 3), np.float16), np.zeros((4, 3, 2, 2), np.float32)):
            with pytest.raises(ValueError, match="as in the first chunk"):
                writer.append(bad)
    assert np.load(tmp_path / "z.npy").shape == (4, 3, 2, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", Mp4Writer), ("a.MP4", Mp4Writer), ("z.npy", LatentWriter), ("p", PngWriter), ("v1.2/", PngWriter), ("made.dir", PngWriter)],
)
def test_the_suffix_chooses(tmp_path, name, kind):
    (tmp_path / "made.dir").mkdir()
    with open_writer(f"{tmp_path}/{name}", fps=16, height=H, width=W) as writer:
        assert type(writer) is kind
        assert writer.takes == ("latents" if kind is LatentWriter else "frames")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.avi", r"unknown output '\.avi'; give a name ending in \.mp4 \(video\) or \.npy"),
        ("a.png", "PNG frames go into a directory; give its name without a suffix, such as a/"),
        ("missing/a.mp4", "missing does not exist"),
        ("missing/a.npy", "missing does not exist"),
        ("missing/frames", "cannot write .*No such file or directory"),
        ("file/", "is a file, and PNG frames go into a directory"),
    ],
)
def test_places_that_do_not_work(tmp_path, name, message):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        open_writer(f"{tmp_path}/{name}", fps=16, height=H, width=W)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="it is a directory"):
        Mp4Writer(tmp_path, 16, H, W)
    with pytest.raises(InputError, match=r"cannot write /proc/out\.mp4"):
        Mp4Writer("/proc/out.mp4", 16, H, W)


def test_probing_what_is_no_video(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    for path in (tmp_path / "x.mp4", tmp_path / "absent.mp4"):
        with pytest.raises(InputError, match="expected a video file"):
            probe_video(path)

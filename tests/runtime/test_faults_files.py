"""Faults on the way to a file: full disks, failing engines, signals, damaged and shared caches. Files are whole or absent."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy

from sanawm.errors import InputError
from sanawm_runtime import EngineError, World, video
from sanawm_runtime.cache import Cache
from sanawm_runtime.clip import ClipRequest, generate_clip
from sanawm_runtime.video import probe_video

COMMAND = Path(__file__).with_name("toy_command.py")


def request(picture, actions="w-96"):
    return ClipRequest(picture, "a plain", action=actions)


def nothing_temporary(folder):
    return not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def fill_disk_after(monkeypatch, appends, partly=100):
    """The disk is full in the middle of the write after so many."""
    written = []
    whole = video._write_all

    def write(file, data):
        written.append(len(data))
        if len(written) > appends:
            file.write(bytes(data)[:partly])
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, data)

    monkeypatch.setattr(video, "_write_all", write)


@pytest.mark.parametrize(("appends", "frames"), [(0, None), (1, 25), (3, 73)])
def test_a_full_disk_keeps_the_chunks_already_written(world, picture, tmp_path, monkeypatch, appends, frames):
    fill_disk_after(monkeypatch, appends)
    kept = "" if frames is None else f"; the {frames} frames before are kept"
    with pytest.raises(InputError, match=f"No space left on device; free space or choose another place{kept}$"):
        generate_clip(world, request(picture), [tmp_path / "clip.mp4"])
    if frames is None:
        assert not list(tmp_path.iterdir())
    else:
        assert probe_video(tmp_path / "clip.mp4")["frames"] == frames
    assert nothing_temporary(tmp_path)
    monkeypatch.undo()
    generate_clip(world, request(picture), [tmp_path / "clip.mp4"])
    assert probe_video(tmp_path / "clip.mp4")["frames"] == 97


def test_a_real_limit_of_the_file_system_is_met_the_same_way(toy_bundle, tmp_path):
    (tmp_path / "first.png").write_bytes(toy.png())

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    arguments = ["run", toy_bundle, "--image", tmp_path / "first.png", "--prompt", "a", "--action", "w-960", "-o", tmp_path / "clip.mp4"]
    done = subprocess.run([sys.executable, COMMAND, "0", *map(str, arguments)], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "sanawm: cannot write" in done.stderr and "frames before are kept" in done.stderr and "Traceback" not in done.stderr
    facts = probe_video(tmp_path / "clip.mp4")
    assert facts["frames"] > 25 and (facts["frames"] - 25) % 24 == 0
    assert nothing_temporary(tmp_path) and not (tmp_path / "clip.timing.json").exists()


def test_an_engine_error_keeps_the_video_and_wins_over_what_follows(world, picture, tmp_path, monkeypatch):
    def fail(name):
        if name == "denoise_steady":
            raise EngineError("device lost")

    world.engine.before_run = fail
    # Closing fails as well; the first error is the one to see.
    real = video.Mp4Writer.close

    def close(self):
        real(self)
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(video.Mp4Writer, "close", close)
    with pytest.raises(EngineError, match="device lost"):
        generate_clip(world, request(picture), [tmp_path / "clip.mp4", tmp_path / "latents.npy"])
    monkeypatch.undo()
    assert probe_video(tmp_path / "clip.mp4")["frames"] == 49
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    world.engine.before_run = lambda name: None
    generate_clip(world, request(picture), [tmp_path / "clip.mp4"])
    assert probe_video(tmp_path / "clip.mp4")["frames"] == 97


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_whole_files(toy_bundle, tmp_path, eventually, number, code):
    (tmp_path / "first.png").write_bytes(toy.png())
    clip = tmp_path / "clip.mp4"
    arguments = ["run", toy_bundle, "--image", tmp_path / "first.png", "--prompt", "a", "--action", "w-9600", "-o", clip, "-o", tmp_path / "l.npy"]
    process = subprocess.Popen([sys.executable, COMMAND, "0.05", *map(str, arguments), "--at-end", "continue"], stderr=subprocess.PIPE, text=True)
    eventually(clip.exists, 60)
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in errors, errors
    facts = probe_video(clip)
    assert facts["frames"] >= 25 and (facts["frames"] - 25) % 24 == 0
    # Latents are whole or absent.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "first.png"]


def test_a_path_beyond_the_time_axis_is_refused_before_anything_is_made(world, picture, tmp_path):
    with pytest.raises(InputError, match="8185 frames, and 9601 are asked for"):
        generate_clip(world, request(picture, "w-9600"), [tmp_path / "clip.mp4"])
    assert not list(tmp_path.iterdir()) and not world.engine.calls


def start_with_cache(bundle, folder, picture):
    """Frames of a first chunk, and how often the text encoder ran."""
    with World.open(bundle, cache=folder) as world:
        frames = world.start(picture, "a plain").hold("w").frames
        return frames, [name for name, _ in world.engine.calls].count("text_encoder")


def test_a_prompt_is_encoded_once_for_all_processes(toy_bundle, toy_engine, picture, tmp_path):
    first = start_with_cache(toy_bundle, tmp_path / "cache", picture)
    again = start_with_cache(toy_bundle, tmp_path / "cache", picture)
    assert (first[1], again[1]) == (1, 0) and np.array_equal(first[0], again[0])


def damages():
    def cut(data):
        return data[: len(data) // 2]

    def flip(data):
        return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]

    def head(data):
        return b"X" + data[1:]

    return {"cut": cut, "flip": flip, "head": head, "empty": lambda data: b"", "longer": lambda data: data + b"x", "other": lambda data: os.urandom(64)}


@pytest.mark.parametrize("damage", damages())
def test_a_corrupted_cache_is_noticed_and_mended(toy_bundle, toy_engine, picture, tmp_path, damage, caplog):
    folder = tmp_path / "cache"
    expected, _ = start_with_cache(toy_bundle, folder, picture)
    (entry,) = folder.iterdir()
    entry.write_bytes(damages()[damage](entry.read_bytes()))
    frames, encoded = start_with_cache(toy_bundle, folder, picture)
    assert encoded == 1 and np.array_equal(frames, expected)
    assert "cache_damaged" in [record.message for record in caplog.records]
    frames, encoded = start_with_cache(toy_bundle, folder, picture)
    assert encoded == 0 and np.array_equal(frames, expected)


def test_an_entry_of_another_key_is_not_taken(tmp_path):
    cache = Cache(tmp_path)
    cache.put("one", b"1" * 8)
    os.rename(cache._place("one"), cache._place("two"))
    assert cache.get("two", 8) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [7, 9, 100])
def test_a_whole_entry_of_another_size_is_not_taken(tmp_path, size):
    cache = Cache(tmp_path)
    cache.put("one", b"1" * 8)
    assert cache.get("one", 8) and cache.get("one", size) is None


def test_a_cache_that_cannot_be_written_stops_nobody(toy_bundle, toy_engine, picture, tmp_path, monkeypatch, caplog):
    real = Path.write_bytes

    def full(self, data):
        if self.name.endswith(".tmp"):
            real(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    frames, encoded = start_with_cache(toy_bundle, tmp_path / "cache", picture)
    assert frames.shape == (25, 64, 64, 3) and encoded == 1
    assert "cache_not_written" in [record.message for record in caplog.records]
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_folder_that_cannot_be_made_is_a_sentence(toy_bundle, toy_engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache folder"):
        World.open(toy_bundle, cache=tmp_path / "file" / "cache")


def test_a_cache_stays_within_its_size_and_forgets_what_was_not_used(tmp_path):
    cache = Cache(tmp_path, max_bytes=5 * 1100)
    for number in range(8):
        cache.put(f"key {number}", bytes([number]) * 1000)
        os.utime(cache._place(f"key {number}"), (number, number))
        assert cache.get("key 0", 1000)  # used all along
        os.utime(cache._place("key 0"), (100, 100))
    kept = [number for number in range(8) if cache.get(f"key {number}", 1000)]
    assert kept == [0, 4, 5, 6, 7]


def test_an_entry_that_another_process_removes_first_is_no_error(tmp_path, monkeypatch):
    cache = Cache(tmp_path, max_bytes=3000)
    cache.put("old", b"1" * 2000)
    real = os.unlink

    def beaten(path, *arguments, **options):
        real(path, *arguments, **options)
        real(path, *arguments, **options)

    monkeypatch.setattr("sanawm_runtime.cache.os.unlink", beaten)
    assert cache.put("new", b"2" * 2000)
    monkeypatch.undo()
    assert cache.get("new", 2000) and cache.get("old", 2000) is None


def hammer(folder, seed, rounds, queue):
    """Write, read, damage and remove entries that another process works on too."""
    generator = np.random.default_rng(seed)
    cache = Cache(folder, max_bytes=40_000)
    bad = 0
    for _ in range(rounds):
        key = str(generator.integers(0, 12))
        right = key.encode() * (4000 // len(key))
        action = generator.integers(0, 10)
        if action < 4:
            bad += not cache.put(key, right)
        elif action < 9:
            found = cache.get(key, len(right))
            bad += found is not None and found != right
        else:
            try:
                cache._place(key).write_bytes(os.urandom(50))
            except OSError:
                continue
    queue.put(bad)


def test_two_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=hammer, args=(tmp_path, seed, 1500, queue)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [0, 0]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))

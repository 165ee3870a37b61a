"""Streams: atomic steps, forks, resets, cancelling, the end of the time axis, and the public names."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import sanawm_runtime
from sanawm.camera import ActionIntegrator
from sanawm_runtime import CameraError, Cancelled, EngineError, InputError, StreamClosed, StreamEnded, World
from sanawm_runtime.chunk import Chunk
from sanawm_runtime.marks import _library


def chunks(stream, keys, count):
    return [stream.hold(keys) for _ in range(count)]


def same(one: Chunk, other: Chunk) -> bool:
    return np.array_equal(one.frames, other.frames) and np.array_equal(one.latents, other.latents)


def near_the_end(stream):
    """Move a stream to the last chunk that its time axis has room for."""
    chunks(stream, "w", 2)
    rollout = stream._rollout
    rollout.chunks = (stream.world.config.dit.rope_frames - stream.world.geometry.first_frames) // stream.world.config.stream.chunk_frames
    stream.chunks_done = rollout.chunks
    return stream


def test_the_public_names_stay():
    assert sanawm_runtime.__all__ == [
        "BundleError",
        "CameraError",
        "Cancelled",
        "Chunk",
        "EngineError",
        "InputError",
        "Live",
        "LiveStats",
        "Stream",
        "StreamClosed",
        "StreamEnded",
        "UserError",
        "World",
    ]
    for name in sanawm_runtime.__all__:
        assert getattr(sanawm_runtime, name).__name__ == name
    for error in ("BundleError", "CameraError", "Cancelled", "EngineError", "InputError", "StreamClosed", "StreamEnded"):
        assert issubclass(getattr(sanawm_runtime, error), sanawm_runtime.UserError)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sanawm_runtime.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("World", "bundle close closed config encode_image engine geometry image_size input_intrinsics open prepare_image programs run_program start start_prepared turns warm_up"),
        ("Stream", "cancel close closed ended fork generate hold play poses_needed reset step"),
        ("Live", "close ended error get hold pause paused ready reset resume stats want"),
    ],
)  # fmt: skip
def test_the_public_methods_stay(kind, names, world, picture):
    thing = getattr(sanawm_runtime, kind)
    found = {name for name in dir(thing) if not name.startswith("_")}
    if kind == "World":
        found |= {name for name in vars(world) if not name.startswith("_")}
    assert sorted(found) == names.split()


def test_chunks_number_their_frames(world, picture):
    stream = world.start(picture, "a plain")
    made = chunks(stream, "w", 3)
    assert [chunk.start for chunk in made] == [0, 25, 49]
    assert [len(chunk.frames) for chunk in made] == [25, 24, 24]
    assert stream.frames_done == 73 and stream.chunks_done == 3
    assert set(made[0].seconds) == {"camera", "denoise", "commit", "decode"}


def test_a_fork_goes_on_alike_and_apart(world, picture):
    stream = world.start(picture, "a plain")
    chunks(stream, "w", 4)
    fork = stream.fork()
    assert same(stream.hold("d"), fork.hold("d"))
    assert not same(stream.hold("a"), fork.hold("d"))
    # The fork's motion did not move the stream's camera, nor its state.
    again = world.start(picture, "a plain")
    expected = [*chunks(again, "w", 4), again.hold("d"), again.hold("a"), again.hold("w")]
    assert same(stream.hold("w"), expected[-1])


def test_a_reset_gives_the_same_bytes_again(world, picture):
    stream = world.start(picture, "a plain", seed=5)
    before = chunks(stream, "wd", 4)
    stream.reset()
    assert all(same(one, other) for one, other in zip(before, chunks(stream, "wd", 4)))
    stream.reset(seed=6)
    assert not same(before[0], stream.hold("wd")) and stream.seed == 6
    with pytest.raises(InputError, match="seed"):
        stream.reset(seed=-1)


def test_bad_poses_leave_the_stream_as_it_was(world, picture):
    stream, twin = world.start(picture, "a"), world.start(picture, "a")
    first = np.tile(np.eye(4), (25, 1, 1))
    for bad in (first[:24], np.zeros((25, 4, 4)), np.full((25, 4, 4), np.nan)):
        with pytest.raises(CameraError):
            stream.step(bad)
    assert same(stream.step(first), twin.step(first))
    with pytest.raises(CameraError, match="unknown key"):
        stream.hold("wx")
    with pytest.raises(CameraError, match="24 frames"):
        stream.hold(["w"] * 3)
    assert same(stream.hold("w"), twin.hold("w"))


def test_keys_can_change_within_a_chunk_and_are_asked_late(world, picture):
    stream = world.start(picture, "a")
    asked = []

    def keys(frames):
        asked.append(frames)
        return ["w"] * 10 + ["d"] * (frames - 10)

    chunk = stream.hold(keys)
    assert asked == [24]  # pose 0 is where the stream begins
    integrator = ActionIntegrator()
    expected = [integrator.pose.copy(), *(integrator.step(key) for key in ["w"] * 10 + ["d"] * 14)]
    np.testing.assert_array_equal(chunk.poses, np.stack(expected))


def test_a_cancelled_step_leaves_the_stream_as_it_was(world, picture):
    stream, twin = world.start(picture, "a"), world.start(picture, "a")
    assert same(stream.hold("w"), twin.hold("w"))
    for stop in ("camera", "denoise_second"):
        world.engine.before_run = lambda name, stop=stop: stream.cancel() if name == stop else None
        with pytest.raises(Cancelled):
            stream.hold("wd")
        world.engine.before_run = lambda name: None
    assert same(stream.hold("wd"), twin.hold("wd"))


def test_a_step_that_has_begun_to_commit_is_not_cancelled(world, picture):
    stream = world.start(picture, "a")
    world.engine.before_run = lambda name: stream.cancel() if name.startswith("commit") else None
    stream.hold("w")
    world.engine.before_run = lambda name: None
    with pytest.raises(Cancelled):  # it holds for the next one
        stream.hold("w")
    stream.hold("w")


def test_cancelling_from_another_thread_does_not_wait_for_the_engine(world, picture):
    stream = world.start(picture, "a")
    failed: list[BaseException] = []

    def step():
        try:
            stream.hold("w")
        except Cancelled as error:
            failed.append(error)

    with world.turns.take():  # someone else has the engine
        thread = threading.Thread(target=step)
        thread.start()
        while world.turns.waiting == 0:
            pass
        stream.cancel()
        thread.join(5)
        assert failed and not thread.is_alive()
    stream.hold("w")


def test_a_start_can_be_given_up(world, picture):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        world.start(picture, "a", cancel=cancel)


def test_the_time_axis_ends_with_a_mark_and_an_error(world, picture):
    stream = near_the_end(world.start(picture, "a"))
    chunk = stream.hold("w")
    assert chunk.last and stream.ended
    with pytest.raises(StreamEnded, match="1024 latent frames"):
        stream.hold("w")
    assert list(stream.play("w")) == []
    stream.reset()
    assert not stream.hold("w").last


def test_a_whole_time_axis_has_341_chunks(world, picture):
    world.engine._mix = lambda *args: None
    made = list(world.start(picture, "a").play("w"))
    assert len(made) == 341 and made[-1].last and not made[-2].last
    assert made[-1].start + len(made[-1].frames) == 8 * 1024 - 7


def test_it_can_go_on_from_the_last_frame(world, picture):
    stream = near_the_end(world.start(picture, "a", at_end="continue"))
    world.engine.calls.clear()
    last = stream.hold("w")
    assert not last.last and not stream.ended and stream.poses_needed == 24
    done = stream.frames_done
    anew = stream.hold("w")
    assert anew.run == 1 and len(anew.frames) == len(anew.poses) == 24 and anew.start == done
    assert "image_encoder" in [name for name, _ in world.engine.calls]
    # The camera goes on where it was: forward at 0.025 units a frame without a jump.
    steps = np.diff(np.concatenate([last.poses, anew.poses])[:, 2, 3])
    np.testing.assert_allclose(steps, 0.025, atol=1e-6)  # the heading's epsilon is 1e-6
    assert stream.hold("w").run == 1 and stream.poses_needed == 24


def test_a_cancelled_new_beginning_can_be_repeated(world, picture):
    stream, twin = (near_the_end(world.start(picture, "a", at_end="continue")) for _ in range(2))
    assert same(stream.hold("w"), twin.hold("w"))
    world.engine.before_run = lambda name: stream.cancel() if name == "camera_first" else None
    with pytest.raises(Cancelled):
        stream.hold("w")
    world.engine.before_run = lambda name: None
    assert stream.poses_needed == 24
    assert same(stream.hold("w"), twin.hold("w")) and same(stream.hold("w"), twin.hold("w"))


def test_a_closed_stream_says_so(world, picture):
    with world.start(picture, "a") as stream:
        stream.hold("w")
    stream.close()
    assert stream.closed
    for call in (lambda: stream.hold("w"), stream.fork, stream.reset, lambda: stream.poses_needed):
        with pytest.raises(StreamClosed, match="stream is closed"):
            call()


def test_a_closed_world_says_so(toy_bundle: Path, toy_engine, picture):
    world = World.open(toy_bundle)
    stream = world.start(picture, "a")
    world.close()
    world.close()
    assert world.closed and stream.closed
    for call in (lambda: stream.hold("w"), lambda: world.start(picture, "a"), world.warm_up):
        with pytest.raises(StreamClosed, match="world is closed"):
            call()


def test_a_chunk_is_a_dlpack_producer_without_a_copy(world, picture):
    import torch

    chunk = world.start(picture, "a").hold("w")
    tensor = torch.from_dlpack(chunk)
    assert tensor.data_ptr() == chunk.frames.ctypes.data and tuple(tensor.shape) == chunk.frames.shape
    assert np.shares_memory(np.from_dlpack(chunk), chunk.frames)


def test_progress_counts_every_program(world, picture):
    seen: list[tuple[str, int, int]] = []
    stream = world.start(picture, "a", on_progress=lambda *news: seen.append(news))
    stream.hold("w")
    assert seen == [
        ("camera", 1, 10),
        *(("denoise", number, 10) for number in range(2, 6)),
        ("commit", 6, 10),
        *(("decode", number, 10) for number in range(7, 11)),
    ]
    seen.clear()
    stream.hold("w")
    assert seen[-1] == ("decode", 9, 9)
    loaded: list[tuple[str, int, int]] = []
    world.warm_up(lambda *news: loaded.append(news))
    assert loaded[0][1:] == (1, 13) and loaded[-1][1:] == (13, 13)


def test_a_callback_cannot_step_or_close(world, picture):
    stream = world.start(picture, "a")
    for reentry in (lambda: world.start(picture, "b"), world.close):
        stream.on_progress = lambda *news, reentry=reentry: reentry()
        with pytest.raises(RuntimeError, match="callback"):
            stream.hold("w")
    stream.on_progress = None
    stream.hold("w")


def test_profilers_see_the_stages(world, picture, monkeypatch):
    import sys
    import types
    from contextlib import contextmanager

    seen: list[tuple[str, str]] = []
    library = types.ModuleType("nvtx")

    @contextmanager
    def annotate(message, color, domain):
        seen.append((message, domain))
        yield

    library.annotate = annotate
    monkeypatch.setitem(sys.modules, "nvtx", library)
    _library.cache_clear()
    try:
        world.start(picture, "a").hold("w")
    finally:
        _library.cache_clear()
    assert seen == [(stage, "sanawm") for stage in ("camera", "denoise", "commit", "decode")]


def test_an_engine_error_is_final_until_a_reset(world, picture):
    stream, other = world.start(picture, "a"), world.start(picture, "a")

    def fail(name):
        if name == "denoise_first":
            raise EngineError("out of memory")

    world.engine.before_run = fail
    with pytest.raises(EngineError, match="out of memory"):
        stream.hold("w")
    world.engine.before_run = lambda name: None
    with pytest.raises(EngineError, match=r"failed in chunk 0 \(out of memory\)"):
        stream.hold("w")
    with pytest.raises(EngineError):
        stream.fork()
    expected = other.hold("w")
    stream.reset()
    assert same(stream.hold("w"), expected)

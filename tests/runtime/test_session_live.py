"""Live streams: keys while it runs, back-pressure, lateness, endings."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import toy

from sanawm_runtime import CameraError, EngineError, InputError, Live, StreamClosed
from sanawm_runtime.held import HeldKeys


def test_it_makes_one_chunk_ahead_and_waits(world, picture, eventually):
    with Live(world.start(picture, "a")) as live:
        eventually(lambda: live.stats().waiting == 1)
        time.sleep(0.2)
        assert live.stats().made == 1
        assert live.get().index == 0
        eventually(lambda: live.stats().waiting == 1)
        assert [live.get(5).index for _ in range(3)] == [1, 2, 3]
        assert live.stats().dropped == 0


def test_without_a_queue_it_makes_what_is_wanted(world, picture, eventually):
    with Live(world.start(picture, "a"), ahead=0) as live:
        time.sleep(0.1)
        assert live.stats().made == 0
        live.want(2)
        eventually(lambda: live.stats().waiting == 2)
        time.sleep(0.1)
        assert live.stats().made == 2
        live.want(2)  # they are there already
        time.sleep(0.1)
        assert live.stats().made == 2
        assert [live.get(5).index for _ in range(3)] == [0, 1, 2]


def test_a_full_queue_may_drop_the_oldest(world, picture, eventually):
    with Live(world.start(picture, "a"), ahead=2, when_full="drop") as live:
        eventually(lambda: live.stats().dropped >= 3)
        live.pause()
        time.sleep(0.1)
        stats = live.stats()
        first = live.get(5)
        assert first.index == stats.dropped and live.get(5).index == first.index + 1
        assert stats.made == stats.dropped + stats.waiting


def test_keys_count_from_the_next_chunk_on(world, picture, eventually):
    with Live(world.start(picture, "a"), ahead=0) as live:
        still = live.get(5)
        assert np.array_equal(still.poses[0], still.poses[-1])
        live.hold("w")
        moved = live.get(5)
        assert moved.poses[-1][2, 3] == pytest.approx(24 * 0.025, abs=1e-4)  # the heading's epsilon is 1e-6
        with pytest.raises(CameraError, match="unknown key"):
            live.hold("q")


def test_a_tap_between_chunks_is_not_lost():
    now = [0.0]
    keys = HeldKeys(16, lambda: now[0])
    keys.set("w")
    now[0] += 0.5
    keys.set("")
    assert keys.held == ""
    taken = keys.take(24)
    assert taken == ["w"] * 8 + [""] * 16
    assert keys.take(24) == [""] * 24
    keys.set("d")
    now[0] += 0.001  # too short to see
    keys.set("wD")
    now[0] += 0.1
    keys.set("w")
    # d was down for 0.101 s, less than the least that shows; w still is.
    assert keys.take(24) == ["wd"] * 4 + ["w"] * 20 and keys.held == "w"


def test_a_slow_stream_says_that_it_is_behind(world, picture, caplog):
    caplog.set_level("INFO", "sanawm")
    toy.slow(world.engine, "denoise", 0.46)  # four steps: 1.84 s for chunks that play 1.5 s
    with Live(world.start(picture, "a")) as live:
        assert not (live.get(30), live.stats())[1].behind
        live.get(30)
        stats = live.stats()
        assert stats.behind and stats.late_s > 0.25 and stats.pace < 0.9
    assert "behind" in [record.message for record in caplog.records]


def test_a_viewer_who_waits_does_not_make_it_late(world, picture, eventually):
    with Live(world.start(picture, "a")) as live:
        live.get(5)
        eventually(lambda: live.stats().waiting == 1)
        live._pace_clock._due -= 5.0  # as if five seconds had passed while the queue was full
        live.pause()
        time.sleep(0.05)
        live.get(5)
        assert live.stats().late_s == 0.0
        assert not live.stats().behind


def test_it_pauses_and_resumes(world, picture, eventually):
    with Live(world.start(picture, "a")) as live:
        eventually(lambda: live.stats().waiting == 1)
        live.pause()
        live.get(5)
        with pytest.raises(TimeoutError):
            live.get(0.2)
        live.resume()
        assert live.get(5).index == 1


def test_it_ends_with_the_time_axis_and_can_begin_again(world, picture):
    stream = world.start(picture, "a")
    stream.hold("w")
    first = stream.hold("w").frames
    stream._rollout.chunks = 340
    with Live(stream) as live:
        made = list(live)
        assert len(made) == 1 and made[0].last and live.ended == "time axis"
        assert live.get() is None
        live.reset()
        assert live.get(5).index == 0 and live.ended is None
        live.hold("w")
    assert live.ended == "closed" and first.shape == (24, 64, 64, 3)


def test_an_error_comes_after_what_was_made_and_a_reset_mends_it(world, picture, eventually):
    def fail(name):
        if name == "denoise_second":
            raise EngineError("device lost")

    world.engine.before_run = fail
    with Live(world.start(picture, "a"), ahead=2) as live:
        eventually(lambda: live.ended)
        assert live.ended == "error" and isinstance(live.error, EngineError)
        assert live.get().index == 0
        with pytest.raises(EngineError, match="device lost"):
            live.get()
        world.engine.before_run = lambda name: None
        live.reset(seed=3)
        assert [live.get(5).index for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(InputError):
            live.reset(seed=-1)


def test_a_reset_forgets_what_is_under_way(world, picture, eventually):
    toy.slow(world.engine, "denoise", 0.05)
    with Live(world.start(picture, "a"), ahead=1) as live:
        for _ in range(5):
            live.get(5)
            time.sleep(0.03)  # somewhere in the next chunk
            live.reset()
            assert live.get(5).index == 0


def test_closing_interrupts_a_chunk_and_ends_the_thread(world, picture):
    toy.slow(world.engine, "denoise", 0.4)
    live = Live(world.start(picture, "a"))
    time.sleep(0.1)
    begin = time.monotonic()
    live.close()
    live.close()
    # One program's time, not the chunk's 1.6 s.
    assert time.monotonic() - begin < 1.2
    assert not [thread for thread in threading.enumerate() if thread.name == "sanawm-live"]
    assert live.ended == "closed" and live.stream.closed and live.get() is None
    with pytest.raises(StreamClosed):
        live.reset()


def test_its_own_callback_may_close_it(world, picture, eventually):
    made: list[Live] = []
    stream = world.start(picture, "a")
    with world.turns.take():
        made.append(Live(stream, on_change=lambda: made[0].close()))
    (live,) = made
    eventually(lambda: live.ended == "closed")
    eventually(lambda: not live._thread.is_alive())


def test_a_closed_world_ends_it(toy_bundle, toy_engine, picture, eventually):
    from sanawm_runtime import World

    world = World.open(toy_bundle)
    live = Live(world.start(picture, "a"))
    live.get(5)
    world.close()
    eventually(lambda: live.ended == "closed")
    live.close()


@pytest.mark.parametrize(("options", "words"), [({"ahead": -1}, "ahead"), ({"ahead": 0, "when_full": "drop"}, "ahead"), ({"when_full": "x"}, "'drop'")])
def test_bad_options_are_refused(world, picture, options, words):
    with pytest.raises(InputError, match=words):
        Live(world.start(picture, "a"), **options)

"""Several sessions on one engine: turns in order, results as alone, and nothing shared but the prompt."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from sanawm_runtime import Cancelled, StreamClosed
from sanawm_runtime.turns import Turns


def test_turns_go_to_whoever_came_first(eventually):
    turns, order, threads = Turns(), [], []

    def wait(number):
        with turns.take():
            order.append(number)

    with turns.take() as waited:
        assert waited < 1
        for number in range(8):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            eventually(lambda number=number: turns.waiting == number + 1)
    for thread in threads:
        thread.join(5)
    assert order == list(range(8)) and turns.waiting == 0


def test_a_greedy_stream_does_not_starve_the_others():
    # An ordinary lock fails this: who gives it back gets it again at once.
    turns, counts, stop = Turns(), [0] * 6, threading.Event()

    def work(number):
        while not stop.is_set():
            with turns.take():
                counts[number] += 1
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.8)
    stop.set()
    for thread in threads:
        thread.join(5)
    # In line everyone gets one turn a round; the slack covers threads that started late.
    assert min(counts) > 0 and max(counts) - min(counts) <= max(counts) // 4 + 2, counts


def test_who_gives_up_leaves_the_line(eventually):
    turns, gave_up, results = Turns(), threading.Event(), []

    def impatient():
        try:
            with turns.take(gave_up.is_set):
                results.append("ran")
        except Cancelled:
            results.append("cancelled")

    def patient():
        with turns.take():
            results.append("ran")

    threads = [threading.Thread(target=impatient), threading.Thread(target=patient)]
    with turns.take():
        for number, thread in enumerate(threads):
            thread.start()
            eventually(lambda number=number: turns.waiting == number + 1)
        gave_up.set()
        turns.wake()
        threads[0].join(5)
        assert results == ["cancelled"] and turns.waiting == 1
    threads[1].join(5)
    assert results == ["cancelled", "ran"]


def test_closing_waits_for_the_turn_and_sends_the_line_home(eventually):
    turns, results, inside, leave = Turns(), [], threading.Event(), threading.Event()

    def hold():
        with turns.take():
            inside.set()
            leave.wait(5)
            results.append("held")

    def wait():
        try:
            with turns.take():
                results.append("ran")
        except StreamClosed:
            results.append("closed")

    def close():
        results.append(turns.close())

    threads = [threading.Thread(target=target) for target in (hold, wait, close)]
    threads[0].start()
    inside.wait(5)
    threads[1].start()
    eventually(lambda: turns.waiting == 1)
    threads[2].start()
    threads[1].join(5)
    assert results == ["closed"] and threads[2].is_alive()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert results == ["closed", "held", True] and turns.close() is False


def test_streams_in_threads_make_what_they_make_alone(world, picture):
    def story(number):
        return ["w", "wd", "a", "i"][number % 4 :] + ["w"] * 3

    alone = []
    for number in range(6):
        stream = world.start(picture, f"world {number % 2}", seed=number)
        alone.append([stream.hold(keys).frames for keys in story(number)])
    made: list[list[np.ndarray]] = [[] for _ in range(6)]

    def run(number):
        stream = world.start(picture, f"world {number % 2}", seed=number)
        for keys in story(number):
            made[number].append(stream.hold(keys).frames)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(a, b) for one, other in zip(alone, made) for a, b in zip(one, other, strict=True))
    # Calls of one turn come from one thread, which the engine was told of.
    assert {thread for _, thread in world.engine.calls} <= set(world.engine.activated)


def test_a_closed_stream_gives_its_memory_back(world, picture):
    stream = world.start(picture, "a")
    stream.hold("w")
    fork = stream.fork()
    watched = [weakref.ref(buffer) for buffer in stream._rollout._state._first.values()]
    shared = [weakref.ref(buffer) for buffer in stream._rollout._text.values()]
    stream.close()
    gc.collect()
    assert all(ref() is None for ref in watched) and all(ref() is not None for ref in shared)
    fork.close()
    gc.collect()
    assert all(ref() is None for ref in shared)


def test_a_repeated_prompt_needs_no_text_encoder(world, picture):
    world.start(picture, "a plain")
    world.engine.calls.clear()
    stream = world.start(picture, "a plain")
    assert "text_encoder" not in [name for name, _ in world.engine.calls]
    other = world.start(picture, "a desert")
    assert [name for name, _ in world.engine.calls].count("text_encoder") == 1
    assert not np.array_equal(stream.hold("w").frames, other.hold("w").frames)


def test_remembered_prompts_are_bounded(world, picture):
    for number in range(20):
        world.start(picture, f"prompt {number}")
    assert len(world._prompts._embeddings) == 16
    world.engine.calls.clear()
    world.start(picture, "prompt 19")
    assert "text_encoder" not in [name for name, _ in world.engine.calls]
    world.start(picture, "prompt 0")
    assert "text_encoder" in [name for name, _ in world.engine.calls]


def test_encoders_can_be_freed_after_use(toy_bundle, toy_engine, picture):
    from sanawm_runtime import World

    with World.open(toy_bundle, free_encoders=True) as world:
        world.start(picture, "a")
        names = [name for name, _ in world.engine.calls]
    assert "unload text_encoder" in names and "unload image_encoder" in names


def test_real_streams_interleave_on_one_engine(tiny_world):
    """On ONNX Runtime: two streams driven from two threads give the bytes of each alone."""
    height, width = tiny_world.image_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)

    def run(seed, out):
        with tiny_world.start(image, "a plain", seed=seed) as stream:
            out.append([stream.hold(keys).frames for keys in ("w", "wd", "d")])

    alone: list[list[np.ndarray]] = []
    run(1, alone)
    run(2, alone)
    made: tuple[list, list] = ([], [])
    threads = [threading.Thread(target=run, args=(seed, out)) for seed, out in zip((1, 2), made)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for one, (other,) in zip(alone, made):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_real_fork_and_reset_repeat_the_bytes(tiny_world):
    height, width = tiny_world.image_size
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    with tiny_world.start(image, "a plain") as stream:
        before = [stream.hold("w").frames for _ in range(3)]
        fork = stream.fork()
        after = stream.hold("d").frames
        assert np.array_equal(after, fork.hold("d").frames)
        stream.reset()
        assert all(np.array_equal(frames, stream.hold("w").frames) for frames in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_of_real_buffers_are_exact(tiny_world, dtype):
    from sanawm.programs import TensorSpec

    engine = tiny_world.engine
    spec = TensorSpec("x", dtype, (3, 5))
    source, target = engine.allocate(spec), engine.allocate(spec)
    engine.write(source, np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32))
    engine.copy(source, target)
    assert source.array.tobytes() == target.array.tobytes()

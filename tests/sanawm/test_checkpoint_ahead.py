"""Tensors computed ahead of their writer: order, errors, and threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from sanawm.model.checkpoint.ahead import ahead
from sanawm.model.checkpoint.writers import Entry, Piece

ENTRIES = [Entry(f"t{i}", (i % 5 + 1,), "float32") for i in range(60)]


def fill(entry: Entry) -> Iterator[Piece]:
    for piece in range(entry.shape[0]):
        time.sleep(0.0002 * (hash(entry.key) % 3))
        yield f"{entry.key}/{piece}".encode()


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("synth")]


def test_every_piece_comes_in_order() -> None:
    with ahead(ENTRIES, fill) as computed:
        assert [bytes(p) for e in ENTRIES for p in computed(e)] == [p for e in ENTRIES for p in fill(e)]
    assert not running()


def test_an_error_reaches_the_writer() -> None:
    def broken(entry: Entry) -> Iterator[Piece]:
        yield b"first"
        if entry.key == "t7":
            raise MemoryError("t7")
        yield b"second"

    with pytest.raises(MemoryError, match="t7"), ahead(ENTRIES, broken) as computed:
        for number, entry in enumerate(ENTRIES):
            assert len(list(computed(entry))) == 2 and number < 7
    assert not running()


def test_a_writer_that_stops_leaves_no_thread_behind() -> None:
    made: list[str] = []

    def endless(entry: Entry) -> Iterator[Piece]:
        while True:
            made.append(entry.key)
            yield b""

    with pytest.raises(KeyboardInterrupt), ahead(ENTRIES, endless) as computed:
        for _ in computed(ENTRIES[0]):
            if len(made) > 100:
                raise KeyboardInterrupt
    assert not running()


def test_what_is_computed_ahead_is_bounded() -> None:
    made = dict.fromkeys((entry.key for entry in ENTRIES), 0)

    def long(entry: Entry) -> Iterator[Piece]:
        for _ in range(500):
            made[entry.key] += 1
            yield b""

    with ahead(ENTRIES, long) as computed:
        next(computed(ENTRIES[0]))
        time.sleep(0.2)
        # 64 pieces ready and one in the hands of its thread; one more where the writer took one.
        assert max(made.values()) <= 66


def test_entries_have_their_order() -> None:
    with pytest.raises(AssertionError, match="t1 was asked for before t0"), ahead(ENTRIES, fill) as computed:
        next(computed(ENTRIES[1]))

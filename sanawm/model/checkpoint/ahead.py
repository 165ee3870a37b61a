"""Tensors computed by threads ahead of the one that writes them.

Each tensor has a random generator of its own, so which thread computes it changes nothing; numpy lets go of Python's lock while it draws.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

from sanawm.model.checkpoint.writers import Entry, Fill, Piece

_MOST_THREADS = 16
# Pieces that one tensor may be ahead, and how many tensors for each thread: with pieces of a megabyte at most 128 MB for each thread.
_PIECES = 64
_TENSORS = 2


class _Tensor:
    """The pieces of a tensor, computed by one thread and taken by another."""

    def __init__(self, entry: Entry, fill: Fill, stop: threading.Event) -> None:
        self.entry, self._fill, self._stop = entry, fill, stop
        self._ready: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(_PIECES)

    def compute(self) -> None:
        try:
            for piece in self._fill(self.entry):
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._ready.put(piece)
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def take(self) -> Iterator[Piece]:
        while (piece := self._ready.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            self._room.release()
            yield piece

    def abandon(self) -> None:
        self._room.release()


@contextmanager
def ahead(entries: Sequence[Entry], fill: Fill) -> Iterator[Fill]:
    """`fill` with the pieces of the next tensors already computed; it has to be asked for the entries in the given order."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    stop = threading.Event()
    waiting, started = iter(entries), deque[_Tensor]()
    with ThreadPoolExecutor(threads, thread_name_prefix="synth") as pool:

        def start() -> None:
            if (entry := next(waiting, None)) is not None:
                started.append(_Tensor(entry, fill, stop))
                pool.submit(started[-1].compute)

        def take(entry: Entry) -> Iterator[Piece]:
            tensor = started[0]
            if tensor.entry is not entry:
                raise AssertionError(f"{entry.key} was asked for before {tensor.entry.key}")
            yield from tensor.take()
            started.popleft()
            start()

        try:
            for _ in range(threads * _TENSORS):
                start()
            yield take
        finally:
            stop.set()
            for tensor in started:
                tensor.abandon()
            pool.shutdown(cancel_futures=True)

"""A lock that serves its waiters in the order in which they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sanawm_runtime.errors import Cancelled, StreamClosed


def _never() -> bool:
    return False


class Turns:
    """Turns at one engine.

    An ordinary lock may be taken again by the thread that just gave it back, and with twenty streams on one engine some would never run.
    Here every waiter gets its turn after at most one turn of each other.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._line: deque[object] = deque()
        self._owner: int | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait behind the one whose turn it is."""
        return max(0, len(self._line) - 1)

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def take(self, given_up: Callable[[], bool] = _never) -> Iterator[float]:
        """Wait in line and hold the turn for the `with` block; yields the seconds waited.

        `given_up` is asked while waiting, whenever `wake` was called. Raises Cancelled if it says so, StreamClosed after `close`,
        RuntimeError in a thread that has the turn already.
        """
        self._refuse_owner()
        ticket = object()
        begin = time.perf_counter()
        with self._condition:
            self._line.append(ticket)
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._line[0] is ticket or given_up())
                if self._closed:
                    raise StreamClosed("the world is closed; open it again")
                if given_up():
                    raise Cancelled("cancelled while waiting for the engine")
                self._owner = threading.get_ident()
            yield time.perf_counter() - begin
        finally:
            with self._condition:
                if self._line[0] is ticket:
                    self._owner = None
                self._line.remove(ticket)
                self._condition.notify_all()

    def wake(self) -> None:
        """Make waiters ask again whether they were given up."""
        with self._condition:
            self._condition.notify_all()

    def close(self) -> bool:
        """Wait until the turn in progress is over and allow no more; who waits gets StreamClosed. False if it was closed before."""
        self._refuse_owner()
        with self._condition:
            if self._closed:
                return False
            self._closed = True
            holder = self._line[0] if self._owner is not None else None
            self._condition.notify_all()
            self._condition.wait_for(lambda: holder is None or holder not in self._line)
            return True

    def _refuse_owner(self) -> None:
        if self._owner == threading.get_ident():
            raise RuntimeError("this thread is in the middle of a step, and a callback of it cannot start another or close the world")

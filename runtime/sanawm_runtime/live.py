"""A stream that runs by itself in a thread while a person holds keys."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from sanawm_runtime.chunk import Chunk
from sanawm_runtime.errors import Cancelled, InputError, StreamClosed
from sanawm_runtime.held import HeldKeys
from sanawm_runtime.stream import Stream, checked_seed

WhenFull = Literal["wait", "drop"]
EndReason = Literal["time axis", "closed", "error"]
_log = logging.getLogger("sanawm.live")


@dataclass(frozen=True)
class LiveStats:
    """How a live stream is doing.

    Chunks made, taken and dropped so far, and waiting to be taken; `behind` says whether the last chunk came later than the playback of those
    before it lasted, `late_s` by how much in all; `pace` is frames made in a second over frames played in a second, of the last chunk.
    """

    made: int
    taken: int
    dropped: int
    waiting: int
    behind: bool
    late_s: float
    pace: float


class Live:
    """Runs a stream chunk by chunk in a thread of its own. Made from a `Stream`, which nothing else may drive meanwhile.

    Keys are set at any time with `hold` and count from the next chunk on. Chunks wait in a queue of `ahead`, 1 by default, since every
    waiting chunk delays what a key does; with 0 a chunk is made when `want` or `get` asks for it. When the queue is full, "wait" stops the
    world until there is room: nothing is lost, and a slow viewer sees a slow world. "drop" lets the world go on and throws the oldest
    waiting chunk away, which `LiveStats.dropped` counts. `on_change` is called from the thread after a chunk came, and when the stream is
    over. Iterating yields chunks until then.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        ahead: int = 1,
        when_full: WhenFull = "wait",
        paused: bool = False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        if when_full not in ("wait", "drop") or ahead < (when_full == "drop"):
            raise InputError(f"expected when_full 'wait' and ahead >= 0, or 'drop' and ahead >= 1, found {when_full!r} and {ahead}")
        self.stream = stream
        self.keys = HeldKeys(stream.world.config.stream.fps)
        self.when_full = when_full
        self._ahead = ahead
        self._on_change = on_change
        self._condition = threading.Condition()
        self._queue: deque[Chunk] = deque()
        self._paused, self._closing = paused, False
        self._reset: dict[str, int | None] | None = None
        self._made = self._taken = self._dropped = self._wanted = 0
        self._pace_clock = _PaceClock(stream.world.config.stream.fps)
        self._ended: EndReason | None = None
        self._error: BaseException | None = None
        self._thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="sanawm-live", daemon=True)
        thread.start()
        return thread

    def hold(self, keys: str) -> None:
        """These keys are held from now on ("" to rest). Raises CameraError for an unknown key."""
        self.keys.set(keys)

    def get(self, timeout: float | None = None) -> Chunk | None:
        """The next chunk; None once the stream is over. Raises TimeoutError, and once what came before it is taken the error that ended it."""
        with self._condition:
            if not self._queue and not self._wanted:
                self._wanted = 1
                self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._queue or self._ended, timeout):
                raise TimeoutError(f"no chunk within {timeout} s")
            if self._queue:
                self._taken += 1
                chunk = self._queue.popleft()
                self._condition.notify_all()
                return chunk
            if self._error is not None:
                raise self._error
            return None

    def want(self, chunks: int = 1) -> None:
        """Let so many chunks be waiting or in the making, where that is more than `ahead`."""
        with self._condition:
            self._wanted = max(0, chunks - len(self._queue))
            self._condition.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self.get()) is not None:
            yield chunk

    @property
    def ready(self) -> bool:
        """Whether `get` returns at once."""
        return bool(self._queue) or self._ended is not None

    @property
    def ended(self) -> EndReason | None:
        """Why no more chunks will be made, or None while they are."""
        return self._ended

    @property
    def error(self) -> BaseException | None:
        """The error that ended the stream."""
        return self._error

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Make no further chunk until `resume`."""
        with self._condition:
            self._paused = True

    def resume(self) -> None:
        with self._condition:
            self._paused = False
            self._condition.notify_all()

    def reset(self, seed: int | None = None) -> None:
        """Go back to the first frame before the next chunk, and forget the chunks that wait. Also after the stream is over, unless closed."""
        if seed is not None:
            checked_seed(seed)
        with self._condition:
            if self._closing:
                raise StreamClosed("the live stream is closed; start another")
            self._reset = {"seed": seed}
            self._queue.clear()
            over, self._ended, self._error = self._ended, None, None
            # The chunk in progress belongs to the past.
            self.stream.cancel()
            self._condition.notify_all()
        if over:
            self._thread.join()
            self._thread = self._start()

    def stats(self) -> LiveStats:
        with self._condition:
            clock = self._pace_clock
            return LiveStats(self._made, self._taken, self._dropped, len(self._queue), clock.behind, clock.late_s, clock.pace)

    def close(self) -> None:
        """Give up the chunk in progress, end the thread, close the stream. Harmless when repeated, and from the thread's own callbacks."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self.stream.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        reason: EndReason = "error"
        error: BaseException | None = None
        try:
            reason = self._produce()
        except StreamClosed:
            reason = "closed"
        except BaseException as caught:  # whoever takes the chunks gets it, from `get`
            error = caught
        with self._condition:
            self._ended, self._error = reason, error
            self._condition.notify_all()
        try:
            self._tell()
        except Exception:  # a caller's fault, and the stream is over already
            _log.exception("callback_failed")

    def _produce(self) -> EndReason:
        while True:
            with self._condition:
                begin = time.monotonic()
                self._condition.wait_for(self._may_step)
                stopped_s = time.monotonic() - begin
                if self._closing:
                    return "closed"
                if self._reset is not None:
                    self.stream.reset(**self._reset)
                    self._reset, self._pace_clock = None, _PaceClock(self.stream.world.config.stream.fps)
                    stopped_s = 0.0
            if self.stream.ended:
                return "time axis"
            begin = time.monotonic()
            try:
                chunk = self.stream.hold(self.keys.take)
            except Cancelled:
                continue
            self._keep(chunk, time.monotonic() - begin, stopped_s)
            self._tell()

    def _may_step(self) -> bool:
        room = self.when_full == "drop" or self._wanted or len(self._queue) < self._ahead
        return self._closing or self._reset is not None or bool(room and not self._paused)

    def _keep(self, chunk: Chunk, took_s: float, stopped_s: float) -> None:
        with self._condition:
            if self._reset is not None:
                return
            if self.when_full == "drop" and len(self._queue) >= self._ahead:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(chunk)
            self._wanted = max(0, self._wanted - 1)
            self._made += 1
            was = self._pace_clock.behind
            self._pace_clock.made(len(chunk.frames), took_s, stopped_s)
            if self._pace_clock.behind != was:
                facts = {"chunk": chunk.index, "took_s": round(took_s, 3), "late_s": round(self._pace_clock.late_s, 3)}
                _log.info("behind" if self._pace_clock.behind else "caught_up", extra=facts)
            self._condition.notify_all()

    def _tell(self) -> None:
        if self._on_change:
            self._on_change()


class _PaceClock:
    """Compares when chunks come with how long the chunks before them play. Monotonic, so that setting the machine's clock changes nothing."""

    def __init__(self, fps: float) -> None:
        self.behind = False
        self.late_s = 0.0
        self.pace = 0.0
        self._fps = fps
        self._due: float | None = None

    def made(self, frames: int, took_s: float, stopped_s: float) -> None:
        now, plays_s = time.monotonic(), frames / self._fps
        self.pace = plays_s / max(took_s, 1e-9)
        # Time in which the stream was not allowed to run is not lateness.
        due = now if self._due is None else self._due + stopped_s
        # A twentieth of a chunk is what threads and clocks jitter.
        self.behind = now - due > 0.05 * plays_s
        self.late_s += max(0.0, now - due)
        self._due = max(due, now) + plays_s

"""One client's stream: chunks become messages, held keys become motion, and a broken connection may come back."""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import asdict
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sanawm.errors import EngineError, UserError
from sanawm_runtime.chunk import Chunk
from sanawm_runtime.live import Live
from sanawm_runtime.metrics import Metrics
from sanawm_runtime.mp4 import FragmentEncoder
from sanawm_runtime.serve.limits import Limits
from sanawm_runtime.serve.protocol import JPEG, MP4, RGB, Header, Start, to_text
from sanawm_runtime.stream import Stream

_JPEG_QUALITY = 90
_ENDINGS = {"time axis": "the model's time axis is full; reset, or start a new world from here", "closed": "the world was closed"}
_log = logging.getLogger("sanawm.serve")


class Link(Protocol):
    """Where a session's messages go."""

    async def text(self, message: str) -> None: ...
    async def binary(self, message: bytes) -> None: ...


class Session:
    """A live stream and what of it the client has seen.

    All methods run on the server's event loop; the stream has its thread, and frames are compressed in `pool`. `timings` is shared by all
    sessions and feeds the timeline.
    """

    def __init__(self, stream: Stream, start: Start, limits: Limits, metrics: Metrics, pool: Executor, timings: deque[dict[str, Any]]) -> None:
        self.id = secrets.token_hex(4)
        self.key = secrets.token_urlsafe(24)
        self._start, self._limits, self._metrics, self._pool, self._timings = start, limits, metrics, pool, timings
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._credit = 0
        self._dropped = 0
        self._recorder: FragmentEncoder | None = None
        self._recording: Literal["off", "on", "ending"] = "off"
        self._sending = False
        # A world that waits makes what is asked for; one that does not wait begins when the first chunk is.
        self._begun = start.full == "wait"
        self.live = Live(stream, ahead=0 if self._begun else 1, when_full=start.full, paused=not self._begun, on_change=self._wake)

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    def matches(self, key: str) -> bool:
        """Whether `key` is the secret that the client got when the session began."""
        return hmac.compare_digest(key.encode(), self.key.encode())

    def more(self, chunks: int) -> None:
        """The client has room for so many chunks."""
        granted = max(0, min(chunks, self._limits.window - self._credit))
        if granted and not self._begun:
            self._begun = True
            self.live.resume()
        self._credit += granted
        if self._start.full == "wait":
            self.live.want(self._credit)
        self._changed.set()

    def record(self, on: bool) -> bool:
        """Begin a recording with the next chunk, or end it with the one that is being sent; whether it has ended or begun already."""
        if on:
            self._recording = "on"
        elif self._sending and self._recording != "off":
            self._recording = "ending"
            return False
        else:
            self._stop_recording()
        return True

    def _stop_recording(self) -> None:
        self._recording, self._recorder = "off", None

    def reset(self, seed: int | None) -> None:
        """Back to the first frame, also after the end."""
        self.live.reset(seed)
        self._changed.set()

    def detach(self) -> None:
        """The client is gone: its requests are void, and the world waits for it."""
        self.live.pause()
        self.live.want(0)
        self._credit = 0
        self._sending = False
        self._stop_recording()

    def attach(self) -> None:
        """The client is back. Chunks made for the old connection are still there."""
        self.live.resume()

    async def pump(self, link: Link) -> None:
        """Send chunks as the client asks for them, and say when the stream is over; after a reset it goes on. Runs until cancelled."""
        while True:
            await self._until(lambda: self.live.ready and (self._credit > 0 or self.live.ended is not None))
            taken = time.monotonic()
            try:
                chunk = self.live.get(0)
            except UserError as error:
                _log.warning("stream_failed", extra={"session": self.id, "error": str(error)})
                await self._end(link, "error", str(error))
                continue
            if chunk is None:
                reason = self.live.ended or "closed"
                await self._end(link, reason, _ENDINGS.get(reason, ""))
                continue
            self._credit -= 1
            self._sending = True
            await self._send(link, chunk, taken)
            self._sending = False
            if self._recording == "ending":
                self._stop_recording()
                await link.text(to_text("recording", on=False))

    async def _end(self, link: Link, reason: str, message: str) -> None:
        await link.text(to_text("ended", reason=reason, message=message))
        await self._until(lambda: self.live.ended is None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            # It may have come true since, with the news that were just cleared.
            if not condition():
                await self._changed.wait()

    async def _send(self, link: Link, chunk: Chunk, taken: float) -> None:
        stats = self.live.stats()
        begin = time.perf_counter()
        bodies = await self._loop.run_in_executor(self._pool, self._compress, chunk)
        encode_s = time.perf_counter() - begin
        facts = {
            "chunk": chunk.index,
            "frames": len(chunk.frames),
            "start": chunk.start,
            "run": chunk.run,
            "last": chunk.last,
            "seconds": {name: round(value, 4) for name, value in chunk.seconds.items()},
            "waited_s": round(chunk.waited_s, 4),
            "encode_s": round(encode_s, 4),
            **{name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(stats).items()},
        }
        await link.text(to_text("chunk", **facts))
        size = 0
        for message in self._messages(chunk, bodies):
            size += len(message)
            await link.binary(message)
        latency = chunk.waited_s + sum(chunk.seconds.values()) + time.monotonic() - taken
        self._metrics.count(chunk, latency, size, stats.behind)
        self._metrics.dropped.inc(stats.dropped - self._dropped)
        self._dropped = stats.dropped
        self._timings.append({"frames": len(chunk.frames), "stages": {**chunk.seconds, "encode": encode_s}})
        if self._recording != "off":
            await self._send_recording(link, chunk)

    def _compress(self, chunk: Chunk) -> list[bytes]:
        return [_jpeg(frame) if self._start.format == "jpeg" else frame.tobytes() for frame in chunk.frames]

    def _messages(self, chunk: Chunk, bodies: list[bytes]) -> Iterator[bytes]:
        kind = JPEG if self._start.format == "jpeg" else RGB
        height, width = chunk.frames.shape[1:3]
        for number, body in enumerate(bodies):
            pose = chunk.poses[number, :3].astype(np.float32)
            yield Header(kind, chunk.index, chunk.start + number, width, height, len(bodies) - 1 - number, pose).pack() + body

    async def _send_recording(self, link: Link, chunk: Chunk) -> None:
        try:
            piece = await self._loop.run_in_executor(self._pool, self._record, chunk)
        except EngineError as error:
            self._stop_recording()
            await link.text(to_text("error", code="recording", message=str(error)))
            return
        header = Header(MP4, chunk.index, chunk.start, chunk.frames.shape[2], chunk.frames.shape[1], 0, np.zeros((3, 4), np.float32))
        self._metrics.sent.inc(len(piece))
        await link.binary(header.pack() + piece)

    def _record(self, chunk: Chunk) -> bytes:
        head = b""
        if self._recorder is None:
            height, width = chunk.frames.shape[1:3]
            self._recorder = FragmentEncoder(self.live.stream.world.config.stream.fps, height, width)
            head = self._recorder.head
        return head + self._recorder.encode(chunk.frames)

    async def close(self) -> None:
        """End the stream; waits for the chunk in progress without holding up the loop."""
        await self._loop.run_in_executor(None, self.live.close)


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    # Full chroma: at half of it the thin bright lines of small worlds smear.
    Image.fromarray(frame).save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()

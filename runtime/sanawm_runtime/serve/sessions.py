"""All sessions of a server: who gets in, who comes back, and what ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sanawm.camera import load_image
from sanawm.errors import InputError, UserError
from sanawm_runtime.errors import StreamClosed
from sanawm_runtime.metrics import Metrics
from sanawm_runtime.serve.assets import Sample
from sanawm_runtime.serve.limits import Limits
from sanawm_runtime.serve.protocol import Rejoin, Start
from sanawm_runtime.serve.session import Session
from sanawm_runtime.stream import Stream
from sanawm_runtime.world import World

_TIMELINE_CHUNKS = 240
_log = logging.getLogger("sanawm.serve")


class Busy(UserError):
    """Every session of the server is in use."""


class Sessions:
    """Admits, keeps and ends sessions on one world. Methods run on the event loop."""

    def __init__(self, world: World, limits: Limits, metrics: Metrics, samples: dict[str, Sample]) -> None:
        self.world, self.limits, self.metrics, self.samples = world, limits, metrics, samples
        self.timings: deque[dict[str, Any]] = deque(maxlen=_TIMELINE_CHUNKS)
        self._sessions: dict[str, Session] = {}
        # Those whose client is away, the longest away first, and the timers that end them.
        self._away: dict[str, asyncio.Task[None]] = {}
        self._starting = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._starters = ThreadPoolExecutor(limits.sessions, "sanawm-start")
        self._encoders = ThreadPoolExecutor(2, "sanawm-encode")
        metrics.watch(lambda: float(len(self)), lambda: float(world.turns.waiting))

    def __len__(self) -> int:
        return len(self._sessions) + self._starting

    async def start(self, request: Start, upload: bytes | None) -> Session:
        """A new session. Raises Busy, and UserError for what the client asked wrongly; cancelling it gives up cleanly."""
        image = self._image(request, upload)
        if len(self) >= self.limits.sessions:
            if not self._away:
                raise Busy(f"all {self.limits.sessions} sessions are in use; try again later")
            # Who is here goes before who went away.
            self._end_away(next(iter(self._away)), "replaced")
        self._starting += 1
        cancel = threading.Event()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._starters, self._open_stream, request, image, cancel)
        begin = time.monotonic()
        try:
            stream = await asyncio.shield(future)
        except asyncio.CancelledError:
            cancel.set()
            self.world.turns.wake()
            future.add_done_callback(_close_unwanted)
            raise
        finally:
            self._starting -= 1
        session = Session(stream, request, self.limits, self.metrics, self._encoders, self.timings)
        self._sessions[session.id] = session
        facts = {"session": session.id, "seconds": round(time.monotonic() - begin, 3), "prompt_chars": len(request.prompt)}
        _log.info("session_started", extra={**facts, "sessions": len(self)})
        return session

    def _image(self, request: Start, upload: bytes | None) -> bytes:
        if len(request.prompt) > self.limits.prompt:
            raise InputError(f"the prompt has {len(request.prompt):,} characters and {self.limits.prompt:,} are allowed; shorten it")
        if request.image == "upload":
            if upload is None:
                raise InputError("no image was uploaded; send one as a binary message first, or name a sample")
            return upload
        if request.image not in self.samples:
            raise InputError(f"there is no sample of that name; choose one of {', '.join(self.samples) or 'none'}, or upload an image")
        return self.samples[request.image].image

    def _open_stream(self, request: Start, data: bytes, cancel: threading.Event) -> Stream:
        image = load_image(data, self.limits.image_pixels)
        options: dict[str, Any] = {} if request.scheme is None else {"scheme": request.scheme}
        return self.world.start(
            image, request.prompt, fov_degrees=request.fov, seed=request.seed, at_end=request.at_end, cancel=cancel, **options
        )

    def rejoin(self, request: Rejoin) -> Session:
        """The session of a client that came back. Raises InputError if it is over, or still connected, or not theirs."""
        session = self._sessions.get(request.session)
        if session is None or not session.matches(request.key) or request.session not in self._away:
            raise InputError("that session is over; start a new one")
        self._away.pop(request.session).cancel()
        session.attach()
        _log.info("session_rejoined", extra={"session": session.id})
        return session

    def leave(self, session: Session) -> None:
        """The session's connection broke: keep it for a while."""
        if session.id not in self._sessions:
            return
        session.detach()
        _log.info("client_away", extra={"session": session.id, "kept_s": self.limits.linger_s})
        self._away[session.id] = asyncio.get_running_loop().create_task(self._linger(session))

    async def _linger(self, session: Session) -> None:
        await asyncio.sleep(self.limits.linger_s)
        self._away.pop(session.id, None)
        self.end(session, "vanished")

    def _end_away(self, name: str, reason: str) -> None:
        self._away.pop(name).cancel()
        self.end(self._sessions[name], reason)

    def end(self, session: Session, reason: str) -> None:
        """The session is over; its slot is free at once, its memory after the chunk in progress."""
        if self._sessions.pop(session.id, None) is None:
            return
        self.metrics.ended.labels(reason).inc()
        stats = session.live.stats()
        facts = {"session": session.id, "reason": reason, "chunks": stats.made, "dropped": stats.dropped, "late_s": round(stats.late_s, 3)}
        _log.info("session_ended", extra=facts)
        task = asyncio.get_running_loop().create_task(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End everything and wait for it."""
        for timer in self._away.values():
            timer.cancel()
        self._away.clear()
        for session in list(self._sessions.values()):
            self.end(session, "shutdown")
        while self._closing:
            await asyncio.gather(*self._closing)
        for pool in (self._starters, self._encoders):
            pool.shutdown(wait=False, cancel_futures=True)


def _close_unwanted(future: asyncio.Future[Stream]) -> None:
    with contextlib.suppress(UserError, StreamClosed, asyncio.CancelledError):
        future.result().close()

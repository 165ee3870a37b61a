"""One WebSocket from hello to goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

import sanawm
from sanawm.camera import SCHEMES
from sanawm.camera.actions import DEFAULT_SCHEME
from sanawm.errors import UserError
from sanawm_runtime.serve import protocol
from sanawm_runtime.serve.limits import Limits, Rate
from sanawm_runtime.serve.protocol import Hello, Keys, Message, More, Pause, Ping, ProtocolError, Record, Rejoin, Reset, Resume, Start, Stop, to_text
from sanawm_runtime.serve.session import Session
from sanawm_runtime.serve.sessions import Busy, Sessions

_log = logging.getLogger("sanawm.serve")


@dataclass
class Gate:
    """What all connections of a server share. `token` is None where none is asked for."""

    sessions: Sessions
    limits: Limits
    token: str | None = None
    open: set[Connection] = field(default_factory=set)


class _Refused(Exception):
    """Ends a connection with a close code."""

    def __init__(self, code: int, reason: str, count_as: str) -> None:
        super().__init__(reason)
        self.code, self.reason, self.count_as = code, reason, count_as


class Connection:
    """Reads messages and acts on them; a task beside it sends the session's chunks."""

    def __init__(self, socket: WebSocket, gate: Gate) -> None:
        self._socket, self._gate, self._limits = socket, gate, gate.limits
        self._sessions = gate.sessions
        self._name = secrets.token_hex(3)
        self._rate = Rate(gate.limits.messages_per_s)
        self._upload: bytes | None = None
        self._session: Session | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sending = asyncio.Lock()
        self._bye: tuple[int, str] | None = None

    async def run(self) -> None:
        """Serve the socket until either side ends it."""
        await self._socket.accept()
        metrics = self._sessions.metrics
        clean = False
        self._gate.open.add(self)
        metrics.connections.inc()
        try:
            if len(self._gate.open) > self._limits.connections:
                raise _Refused(protocol.CLOSE_BUSY, f"all {self._limits.connections} connections are in use; try again later", "connections")
            await self._greet()
            while True:
                await self._act(await self._receive(self._limits.idle_s, "idle for too long"))
        except _Refused as refusal:
            metrics.refused.labels(refusal.count_as).inc()
            _log.info("refused", extra={"connection": self._name, "code": refusal.code, "reason": refusal.reason})
            await self._close(refusal.code, refusal.reason)
            clean = True
        except WebSocketDisconnect as gone:
            # 1000 and 1001 are said by a client that leaves on purpose, as a closed tab does. Anything else is a broken connection.
            clean = gone.code in (protocol.CLOSE_NORMAL, protocol.CLOSE_GOING_AWAY)
        except Exception:  # a fault of ours must not take the server along
            _log.exception("internal_error", extra={"connection": self._name})
            await self._close(protocol.CLOSE_INTERNAL, "internal error; see the server's log")
            clean = True
        finally:
            self._gate.open.discard(self)
            metrics.connections.dec()
            await self._cancel_tasks()
            self._part(clean or self._bye is not None)

    async def say_goodbye(self, code: int, reason: str) -> None:
        """End the connection from the server's side."""
        self._bye = (code, reason)
        await self._close(code, reason)

    async def _greet(self) -> None:
        message = await self._receive(self._limits.hello_s, "no hello in time")
        if not isinstance(message, Hello):
            raise _Refused(protocol.CLOSE_POLICY, "the first message must be hello", "protocol")
        if message.protocol != protocol.VERSION:
            raise _Refused(protocol.CLOSE_POLICY, f"this server speaks protocol {protocol.VERSION}; reload the page", "protocol")
        token = self._gate.token
        if token is not None and not hmac.compare_digest(message.token.encode(), token.encode()):
            await asyncio.sleep(0.5)  # guessing is slow
            raise _Refused(protocol.CLOSE_POLICY, "wrong token; open the address that the server printed", "token")
        world, limits = self._sessions.world, self._limits
        height, width = world.image_size
        await self.text(
            to_text(
                "welcome",
                protocol=protocol.VERSION,
                server=sanawm.__version__,
                world={"name": world.bundle.manifest.name, "width": width, "height": height, "fps": world.config.stream.fps},
                chunk_frames=world.config.stream.chunk_frames * world.config.vae.temporal_stride,
                samples=[{"name": name, "prompt": sample.prompt} for name, sample in self._sessions.samples.items()],
                schemes={name: {"yaw": s.yaw_keys, "strafe": s.strafe_keys} for name, s in SCHEMES.items()},
                scheme=DEFAULT_SCHEME,
                limits={"image_bytes": limits.image_bytes, "image_pixels": limits.image_pixels, "prompt": limits.prompt, "window": limits.window},
            )
        )

    async def _receive(self, seconds: float, overdue: str) -> Message | bytes:
        try:
            async with asyncio.timeout(seconds):
                event = await self._socket.receive()
        except TimeoutError:
            raise _Refused(protocol.CLOSE_POLICY, overdue, "idle") from None
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1006))
        if not self._rate.allow():
            raise _Refused(protocol.CLOSE_POLICY, f"more than {self._limits.messages_per_s:g} messages a second", "rate")
        data, text = event.get("bytes"), event.get("text")
        if data is not None:
            if len(data) > self._limits.image_bytes:
                raise _Refused(protocol.CLOSE_TOO_BIG, f"an image may have {self._limits.image_bytes:,} bytes", "image_bytes")
            return bytes(data)
        try:
            return protocol.parse_message(text or "", self._limits.message_bytes)
        except ProtocolError as error:
            raise _Refused(protocol.CLOSE_POLICY, str(error), "protocol") from None

    async def _act(self, message: Message | bytes) -> None:
        if isinstance(message, bytes):
            self._upload = message
            return
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise _Refused(protocol.CLOSE_POLICY, f"{type(message).__name__.lower()} is not expected here", "protocol")
        try:
            await handler(self, message)
        except UserError as error:
            await self._say_error(error)

    async def _say_error(self, error: UserError) -> None:
        await self.text(to_text("error", code=type(error).__name__, message=str(error)))

    def _running(self) -> Session:
        if self._session is None:
            raise UserError("no world is running; start one")
        return self._session

    async def _start(self, message: Start) -> None:
        if "start" in self._tasks:
            raise UserError("a world is being started already; wait for it")
        await self._end_session("replaced")
        self._spawn("start", lambda: self._begin(message))

    async def _begin(self, message: Start) -> None:
        try:
            session = await self._sessions.start(message, self._upload)
        except Busy as busy:
            self._sessions.metrics.refused.labels("sessions").inc()
            await self.say_goodbye(protocol.CLOSE_BUSY, str(busy))
            return
        except UserError as error:
            await self._say_error(error)
            return
        self._upload = None  # it may be large, and the client has it still
        await self._take_on(session, rejoined=False)

    async def _rejoin(self, message: Rejoin) -> None:
        session = self._sessions.rejoin(message)
        await self._end_session("replaced")
        await self._take_on(session, rejoined=True)

    async def _take_on(self, session: Session, rejoined: bool) -> None:
        self._session = session
        await self.text(to_text("started", session=session.id, key=session.key, rejoined=rejoined, seed=session.live.stream.seed))
        self._spawn("pump", lambda: session.pump(self))

    async def _reset(self, message: Reset) -> None:
        self._running().reset(message.seed)

    async def _keys(self, message: Keys) -> None:
        if self._session is not None:  # a key may go up after its world has ended
            self._session.live.hold(message.held)

    async def _more(self, message: More) -> None:
        if self._session is not None:
            self._session.more(message.chunks)

    async def _pause(self, message: Pause) -> None:
        self._running().live.pause()

    async def _resume(self, message: Resume) -> None:
        self._running().live.resume()

    async def _record(self, message: Record) -> None:
        if self._running().record(message.on):
            await self.text(to_text("recording", on=message.on))

    async def _stop(self, message: Stop) -> None:
        await self._end_session("stopped")

    async def _ping(self, message: Ping) -> None:
        await self.text(to_text("pong"))

    def _spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.get_running_loop().create_task(self._guard(name, work))
        self._tasks[name] = task

        def done(finished: asyncio.Task[None]) -> None:
            if self._tasks.get(name) is finished:
                del self._tasks[name]

        task.add_done_callback(done)

    async def _guard(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except WebSocketDisconnect:
            return  # the reading side hears of it too
        except TimeoutError:
            # The close frame may not get through either; the world must not wait for that.
            self._part(clean=False)
            await self._close(protocol.CLOSE_POLICY, "messages are not being read")
        except Exception:  # see run
            _log.exception("internal_error", extra={"connection": self._name, "task": name})
            await self.say_goodbye(protocol.CLOSE_INTERNAL, "internal error; see the server's log")

    async def _end_session(self, reason: str) -> None:
        await self._cancel_tasks()
        session, self._session = self._session, None
        if session is not None:
            self._sessions.end(session, reason)

    async def _cancel_tasks(self) -> None:
        tasks = [task for task in self._tasks.values() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _part(self, clean: bool) -> None:
        """The connection and its session go separate ways."""
        session, self._session = self._session, None
        if session is None:
            return
        if clean:
            self._sessions.end(session, "left")
        else:
            self._sessions.leave(session)

    async def text(self, message: str) -> None:
        async with self._sending:
            self._check_open()
            async with asyncio.timeout(self._limits.send_s):
                await self._socket.send_text(message)

    async def binary(self, message: bytes) -> None:
        async with self._sending:
            self._check_open()
            async with asyncio.timeout(self._limits.send_s):
                await self._socket.send_bytes(message)

    def _check_open(self) -> None:
        if self._socket.application_state is not WebSocketState.CONNECTED or self._socket.client_state is not WebSocketState.CONNECTED:
            raise WebSocketDisconnect(1006)

    async def _close(self, code: int, reason: str) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            # A close frame has room for 123 bytes of reason.
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
                async with asyncio.timeout(5):
                    await self._socket.close(code, reason.encode()[:123].decode(errors="ignore"))


_HANDLERS: dict[type, Callable[[Connection, Any], Awaitable[None]]] = {
    Start: Connection._start,
    Rejoin: Connection._rejoin,
    Keys: Connection._keys,
    More: Connection._more,
    Pause: Connection._pause,
    Resume: Connection._resume,
    Reset: Connection._reset,
    Record: Connection._record,
    Stop: Connection._stop,
    Ping: Connection._ping,
}

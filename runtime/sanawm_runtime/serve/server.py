"""Running the application under uvicorn, with signals that end it cleanly."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from sanawm.errors import UserError
from sanawm_runtime.serve.app import say_goodbye
from sanawm_runtime.serve.limits import Limits

_log = logging.getLogger("sanawm.serve")
# Seconds that clients get to take note, and that a chunk in progress gets to finish.
_GRACE_S = 10


class Server(uvicorn.Server):
    """uvicorn that says goodbye before it closes sockets, and returns after SIGINT and SIGTERM instead of dying of them."""

    def __init__(self, app: Starlette, limits: Limits, *, ready: Callable[[], None] | None = None, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=max(limits.image_bytes, limits.message_bytes) + 2**10,
                # JPEG and H.264 do not get smaller, and inflating strangers' messages is work for nothing.
                ws_per_message_deflate=False,
                ws_ping_interval=10,
                ws_ping_timeout=20,
                timeout_graceful_shutdown=_GRACE_S,
                h11_max_incomplete_event_size=16 * 2**10,
                **options,
            )
        )
        self._app = app
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            _log.info("stopping", extra={"signal": signal.Signals(number).name})
            self.force_exit = self.should_exit  # the second one does not wait
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready and self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await say_goodbye(self._app)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that an address in use is a sentence and port 0 has a number. Raises UserError."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --host and --port") from error
    return bound

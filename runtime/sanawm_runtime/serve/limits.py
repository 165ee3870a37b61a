"""What a client may ask of a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on everything a client can make grow.

    sessions: at once, those whose client is away included. connections: open sockets. Images: bytes of a file, pixels it decodes to. prompt:
    characters. messages_per_s: allowed on average over a few seconds. hello_s: time to present a token. idle_s: without any message from
    the client. linger_s: how long a session waits for a client that vanished. send_s: for one message to leave. window: chunks
    asked for and not yet sent. message_bytes: of a text message.
    """

    sessions: int = 4
    connections: int = 64
    image_bytes: int = 16 * 2**20
    image_pixels: int = 24_000_000
    prompt: int = 4000
    messages_per_s: float = 60.0
    hello_s: float = 10.0
    idle_s: float = 600.0
    linger_s: float = 15.0
    send_s: float = 30.0
    window: int = 2
    message_bytes: int = 64 * 2**10


class Rate:
    """A token bucket: `per_s` on average, with bursts of three seconds' worth."""

    def __init__(self, per_s: float, clock: Callable[[], float] | None = None) -> None:
        self._per_s, self._clock = per_s, clock or time.monotonic
        self._tokens = self._most = 3 * per_s
        self._then = self._clock()

    def allow(self) -> bool:
        now = self._clock()
        self._tokens = min(self._most, self._tokens + (now - self._then) * self._per_s)
        self._then = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

"""What every request passes first: is it for this server, and does its page come from here."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE = {
    # Nothing but our own files runs or loads; frames and pictures that the page makes itself are blobs.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def host_of(text: str) -> str:
    """The host of "host", "host:port" or "[v6]:port", in lower case; "" for something else."""
    try:
        return urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """Refuses requests for other hosts and WebSockets of foreign pages, and adds the headers that keep the page to itself.

    A browser lets any web page open a WebSocket to this machine. Its Origin tells: it must be the host that was asked (`Host`), or one of
    `origins`; programs send none. `hosts` (None: any) keeps a foreign name that points here (DNS rebinding) from counting as ours.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = {origin.rstrip("/").lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self._allowed(headers):
            await _refuse(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in _SAFE.items() if n.encode() not in present)]
            await send(message)

        await self._app(scope, receive, send_safely)

    def _allowed(self, headers: Headers) -> bool:
        host = headers.get("host", "")
        if self._hosts is not None and host_of(host) not in self._hosts:
            return False
        origin = headers.get("origin")
        if origin is None or origin.rstrip("/").lower() in self._origins:
            return True
        return origin.lower().partition("://")[2] == host.lower()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": "foreign host or origin"})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": b"This server does not answer under that name.\n"})


def token_matches(headers: Headers, token: str | None) -> bool:
    """Whether a request may see more than the page: always without a token, else with `Authorization: Bearer <token>`."""
    if token is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

"""Messages between a server and its clients.

Text messages are JSON objects with a `type`; a client's binary message is the file of a first frame, a server's one a frame or a piece of a
recording behind a fixed header. `docs/serve.md` lists them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import BundleError, UserError
from sanawm_runtime.bundle.strict_json import decode, parse_json

VERSION = 1

# Close codes (RFC 6455 and its registry) and what they mean here.
CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_POLICY = 1008
CLOSE_TOO_BIG = 1009
CLOSE_INTERNAL = 1011
CLOSE_BUSY = 1013


class ProtocolError(UserError):
    """A message that the protocol does not allow."""


@dataclass(frozen=True)
class Hello:
    """The first message. `token` where the server asks for one."""

    protocol: int
    token: str = ""


@dataclass(frozen=True)
class Start:
    """Begin a session, in place of one that runs. `image` is "upload" (the last binary message) or the name of a sample."""

    prompt: str
    image: str = "upload"
    seed: int = 42
    fov: float | None = None
    scheme: str | None = None
    full: Literal["wait", "drop"] = "wait"
    at_end: Literal["stop", "continue"] = "stop"
    format: Literal["jpeg", "rgb"] = "jpeg"


@dataclass(frozen=True)
class Rejoin:
    """Go on with a session whose connection broke."""

    session: str
    key: str


@dataclass(frozen=True)
class Keys:
    """What is held from now on."""

    held: str


@dataclass(frozen=True)
class More:
    """Room for so many chunks more; none is sent that was not asked for."""

    chunks: int = 1


@dataclass(frozen=True)
class Pause:
    """Make no more chunks."""


@dataclass(frozen=True)
class Resume:
    """Go on after `pause`."""


@dataclass(frozen=True)
class Reset:
    """Back to the first frame, with another seed if given."""

    seed: int | None = None


@dataclass(frozen=True)
class Record:
    """Send an mp4 of what follows, piece by piece, or end it."""

    on: bool


@dataclass(frozen=True)
class Stop:
    """End the session, keep the connection."""


@dataclass(frozen=True)
class Ping:
    """Answered by `pong`; keeps an idle connection."""


Message = Hello | Start | Rejoin | Keys | More | Pause | Resume | Reset | Record | Stop | Ping
_KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in Message.__args__}  # type: ignore[attr-defined]


def parse_message(text: str, max_bytes: int) -> Message:
    """A client's text message from untrusted text. Raises ProtocolError, and nothing else."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ProtocolError("a message is not valid text") from None
    try:
        document = parse_json(data, "message", max_bytes=max_bytes)
        if not isinstance(document, dict) or not isinstance(document.get("type"), str):
            raise ProtocolError("a message is an object with a type")
        kind = document.pop("type")
        if kind not in _KINDS:
            raise ProtocolError(f"unknown message type {json.dumps(kind[:40])}; expected one of {', '.join(_KINDS)}")
        message: Message = decode(_KINDS[kind], document, kind)
    except BundleError as error:
        # One reader for everything untrusted; its advice is for bundles.
        raise ProtocolError(str(error).rpartition(";")[0]) from None
    return message


def to_text(kind: str, **fields: Any) -> str:
    """A server's text message."""
    return json.dumps({"type": kind, **fields}, allow_nan=False)


JPEG, RGB, MP4 = 1, 2, 3
# Kind, version, header bytes, chunk, number of the frame in its stream, columns, rows, frames of the chunk that follow, pose.
_HEADER = struct.Struct("<BBHIQHHI12f")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class Header:
    """What stands before the bytes of a binary message. pose: (3, 4) float32 camera-to-world; zeros where it has no meaning."""

    kind: int
    chunk: int
    frame: int
    width: int
    height: int
    left: int
    pose: NDArray[np.float32]

    def pack(self) -> bytes:
        values = np.asarray(self.pose, np.float32).reshape(12)
        return _HEADER.pack(self.kind, VERSION, HEADER_BYTES, self.chunk, self.frame, self.width, self.height, self.left, *values)


def unpack(data: bytes) -> tuple[Header, bytes]:
    """A server's binary message as its header and body, for clients in Python. Raises ProtocolError."""
    if len(data) < HEADER_BYTES:
        raise ProtocolError(f"a binary message has at least {HEADER_BYTES} bytes, found {len(data)}")
    kind, version, size, chunk, frame, width, height, left, *pose = _HEADER.unpack_from(data)
    if version != VERSION or not HEADER_BYTES <= size <= len(data) or kind not in (JPEG, RGB, MP4):
        raise ProtocolError(f"expected a binary message of protocol {VERSION}, found version {version}, kind {kind}")
    return Header(kind, chunk, frame, width, height, left, np.array(pose, np.float32).reshape(3, 4)), data[size:]

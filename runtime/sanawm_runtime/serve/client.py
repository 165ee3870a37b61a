"""A client for programs: the same messages as the page's, in plain calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import UserError
from sanawm_runtime.serve.protocol import MP4, RGB, VERSION, unpack


class ServerError(UserError):
    """What a server answered when it could not do as asked; `code` is the name of its error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class ServedChunk:
    """A chunk as it came: the server's facts about it, frames (F, H, W, 3) uint8 or JPEG files, poses (F, 3, 4) float32."""

    facts: dict[str, Any]
    frames: NDArray[np.uint8] | list[bytes]
    poses: NDArray[np.float32]


@dataclass
class Client:
    """One connection to `sanawm serve`; use as a context manager.

    `welcome` is what the server said about itself, `session` and `key` are what `rejoin` takes, `recording` collects an mp4. Raises
    ServerError for a refusal; the connection's end is websockets' ConnectionClosed, with the server's close code.
    """

    url: str
    token: str = ""
    timeout_s: float = 60.0
    welcome: dict[str, Any] = field(default_factory=dict, init=False)
    session: str = field(default="", init=False)
    key: str = field(default="", init=False)
    ended: str | None = field(default=None, init=False)
    recording: bytearray = field(default_factory=bytearray, init=False)

    def __post_init__(self) -> None:
        from websockets.sync.client import connect

        address = self.url.replace("http", "ws", 1).rstrip("/") + "/ws"
        # Messages are bounded by what was asked for; a bound of the library's own would hold up its closing handshake.
        self.socket = connect(address, max_size=None, max_queue=None, compression=None, proxy=None, open_timeout=self.timeout_s)
        self.send("hello", protocol=VERSION, token=self.token)
        self.welcome = self.wait_for("welcome")

    def send(self, kind: str, **fields: Any) -> None:
        """A message as `docs/serve.md` lists them."""
        self.socket.send(json.dumps({"type": kind, **fields}))

    def start(self, prompt: str, image: bytes | str, **options: Any) -> dict[str, Any]:
        """Begin a world from the file of a picture, or the name of a sample."""
        if isinstance(image, bytes):
            self.socket.send(image)
        self.send("start", prompt=prompt, image="upload" if isinstance(image, bytes) else image, **options)
        return self._started()

    def rejoin(self, session: str, key: str) -> dict[str, Any]:
        """Go on with the world of a connection that broke."""
        self.send("rejoin", session=session, key=key)
        return self._started()

    def _started(self) -> dict[str, Any]:
        started = self.wait_for("started")
        self.session, self.key, self.ended = started["session"], started["key"], None
        return started

    def chunk(self, ask: bool = True) -> ServedChunk | None:
        """Ask for a chunk and wait for it; None if the world has ended. `ask=False` waits for one asked for before."""
        if ask:
            self.send("more", chunks=1)
        facts = self.wait_for("chunk", "ended")
        if facts["type"] == "ended":
            self.ended = facts["reason"]
            if self.ended == "error":
                raise ServerError("EngineError", facts["message"])
            return None
        frames: list[Any] = []
        poses = []
        while len(frames) < facts["frames"]:
            data = self.socket.recv(self.timeout_s)
            if isinstance(data, str):
                self._take_text(json.loads(data), ())
                continue
            header, body = unpack(data)
            if header.kind == MP4:
                self.recording += body
                continue
            poses.append(header.pose)
            frames.append(np.frombuffer(body, np.uint8).reshape(header.height, header.width, 3) if header.kind == RGB else body)
        return ServedChunk(facts, np.stack(frames) if header.kind == RGB else frames, np.stack(poses))

    def chunks(self) -> Iterator[ServedChunk]:
        """Chunks until the world ends."""
        while (chunk := self.chunk()) is not None:
            yield chunk

    def hold(self, keys: str) -> None:
        """These keys are held from now on."""
        self.send("keys", held=keys)

    def wait_for(self, *kinds: str) -> dict[str, Any]:
        """The next text message of one of these kinds. Pieces of a recording are kept, frames and other news passed over."""
        while True:
            data = self.socket.recv(self.timeout_s)
            if isinstance(data, str):
                found = self._take_text(json.loads(data), kinds)
                if found is not None:
                    return found
            elif unpack(data)[0].kind == MP4:
                self.recording += unpack(data)[1]

    def _take_text(self, message: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any] | None:
        if message["type"] == "error":
            raise ServerError(message["code"], message["message"])
        return message if message["type"] in kinds else None

    def close(self) -> None:
        """Leave; the world ends."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

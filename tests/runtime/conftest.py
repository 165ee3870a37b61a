"""What tests of sessions and the server share: a toy world, and a server around it in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

# Helpers beside this file are plain modules.
sys.path.insert(0, str(Path(__file__).parent))

import toy

if TYPE_CHECKING:
    from sanawm_runtime import World
    from sanawm_runtime.serve.limits import Limits

PICTURE = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of stubs for `toy.ToyEngine`; do not modify it, copy what you damage."""
    return toy.write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def toy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles open with the toy engine."""
    from sanawm_runtime import engines

    monkeypatch.setitem(engines._ENGINES, "onnxruntime", toy.ToyEngine)


@pytest.fixture
def world(toy_bundle: Path, toy_engine: None) -> Iterator[World]:
    """The toy world, opened; `world.engine` is a `toy.ToyEngine`."""
    from sanawm_runtime import World

    with World.open(toy_bundle) as opened:
        yield opened
        assert opened.engine.overlaps == 0


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Commands called in this process set up logs on a stream that ends with their test."""
    logger = logging.getLogger("sanawm")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def picture() -> np.ndarray:
    """A first frame of the toy world, (64, 64, 3) uint8."""
    return PICTURE


@dataclass
class Serving:
    """A server that runs in a thread of this process."""

    url: str
    app: Any
    world: World
    loop: asyncio.AbstractEventLoop

    @property
    def sessions(self) -> Any:
        return self.app.state.gate.sessions

    def metric(self, name: str, **labels: str) -> float:
        """The value of one of the server's metrics now."""
        value = self.sessions.metrics._registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextlib.contextmanager
def run_server(world: World, limits: Limits | None = None, port: int = 0, **options: Any) -> Iterator[Serving]:
    from sanawm_runtime.serve.app import create_app
    from sanawm_runtime.serve.limits import Limits
    from sanawm_runtime.serve.server import Server, listen

    limits = limits or Limits()
    app = create_app(world, limits, **options)
    listening = listen("127.0.0.1", port)
    ready = threading.Event()
    server = Server(app, limits, ready=ready.set)
    loops: list[asyncio.AbstractEventLoop] = []

    def run() -> None:
        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listening])

        asyncio.run(serve())

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    try:
        assert ready.wait(20)
        yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", app, world, loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture
def serving() -> Callable[..., contextlib.AbstractContextManager[Serving]]:
    """serving(world, limits, token=…): a context manager that yields a `Serving`."""
    return run_server


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for a condition; its value, or an assertion error."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
    return value


@pytest.fixture(name="eventually")
def eventually_() -> Callable[..., Any]:
    """eventually(condition, seconds=10): wait for it."""
    return eventually

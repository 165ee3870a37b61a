"""Short soaks: memory, threads and descriptors after many chunks and sessions are what they were after few.

`benchmarks/soak.py` runs the long ones, whose figures are in `docs/serve.md`.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from toy import png

from sanawm_runtime import Live
from sanawm_runtime.serve.client import Client
from sanawm_runtime.serve.limits import Limits

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def rss_mb():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_chunks_leave_nothing_behind(world, picture):
    stream = world.start(picture, "a", at_end="continue")
    for _ in stream.play("wd", 100):
        pass
    before, files, threads = rss_mb(), open_files(), threading.active_count()
    for _ in stream.play("wd", 300):
        pass
    # A chunk's frames are 0.3 MB: keeping one in ten would be 9 MB.
    assert rss_mb() - before < 8
    assert (open_files(), threading.active_count()) == (files, threads)


def test_real_chunks_leave_nothing_behind(tiny_world):
    height, width = tiny_world.image_size
    with tiny_world.start(np.full((height, width, 3), 100, np.uint8), "a plain") as stream:
        for _ in stream.play("w", 8):
            pass
        before = rss_mb()
        for _ in stream.play("w", 24):
            pass
        # A chunk is 4.4 MB of frames alone: keeping one in four would be 26 MB.
        assert rss_mb() - before < 16


def test_sessions_leave_nothing_behind(world, picture):
    def run(count):
        for number in range(count):
            with Live(world.start(picture, f"a {number % 8}")) as live:
                live.get(10)
                with live.stream.fork() as fork:
                    fork.hold("w") if number % 4 == 0 else None

    run(20)
    before, files, threads = rss_mb(), open_files(), threading.active_count()
    run(100)
    # A session's state is 0.4 MB.
    assert rss_mb() - before < 8
    assert (open_files(), threading.active_count()) == (files, threads)


def test_connections_leave_nothing_behind(world, serving, eventually):
    with serving(world, Limits(sessions=4, linger_s=0.05)) as server:

        def run(count):
            for number in range(count):
                client = Client(server.url)
                client.start(f"a {number % 8}", png())
                client.chunk()
                if number % 5 == 0:
                    client.socket.socket.shutdown(socket.SHUT_RDWR)
                client.close()
            eventually(lambda: len(server.sessions) == 0 and not server.app.state.gate.open)
            eventually(lambda: not [thread for thread in threading.enumerate() if thread.name in ("sanawm-live", "recv_events")])

        def threads():
            # Pools of the server and of asyncio start threads up to their size and keep them.
            pools = ("sanawm-start", "sanawm-encode", "asyncio_")
            return sum(not thread.name.startswith(pools) for thread in threading.enumerate())

        run(20)
        time.sleep(0.2)
        before, files, running = rss_mb(), open_files(), threads()
        run(60)
        eventually(lambda: open_files() <= files)
        assert rss_mb() - before < 12  # 60 uploads and states would be 25 MB
        assert threads() <= running
        ended = sum(server.metric("sanawm_sessions_ended_total", reason=reason) for reason in ("left", "vanished", "replaced"))
        assert ended == 80

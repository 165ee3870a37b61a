"""Faults of a server: failing engines, vanishing and slow clients, signals, jumping clocks. The first error is told, the others go on."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from toy import png, slow
from websockets.exceptions import ConnectionClosed

from sanawm_runtime import EngineError
from sanawm_runtime.held import HeldKeys
from sanawm_runtime.serve.client import Client, ServerError
from sanawm_runtime.serve.limits import Limits, Rate

COMMAND = Path(__file__).with_name("toy_command.py")


def fail_in(engine, program, error=None, times=1):
    left = [times]

    def before(name):
        if name == program and left[0]:
            left[0] -= 1
            raise error or EngineError("CUDA error 700: illegal address")

    engine.before_run = before


@pytest.mark.parametrize("program", ["camera", "denoise_second", "commit_second", "decode"])
def test_an_engine_error_ends_one_world_and_not_the_others(world, serving, program):
    with serving(world, Limits(sessions=2)) as server, Client(server.url) as one, Client(server.url) as other:
        one.start("a", png())
        other.start("b", png())
        if program != "decode":
            one.chunk()
        other.chunk()
        fail_in(world.engine, program)
        with pytest.raises(ServerError, match="illegal address"):
            one.chunk()
        assert one.ended == "error"
        assert [other.chunk().facts["chunk"] for _ in range(3)] == [1, 2, 3]
        # A reset mends it, and so does a new world.
        one.send("reset")
        assert one.chunk().facts["chunk"] == 0
        one.start("c", png())
        assert one.chunk().facts["chunk"] == 0


@pytest.mark.parametrize("program", ["text_encoder", "prompt_kv", "image_encoder"])
def test_an_engine_error_in_a_start_is_told_and_the_next_start_works(world, serving, program):
    with serving(world) as server, Client(server.url) as client:
        fail_in(world.engine, program)
        with pytest.raises(ServerError, match="illegal address"):
            client.start("a", png())
        assert len(server.sessions) == 0
        client.start("a", png())
        assert client.chunk()


def test_a_fault_of_ours_closes_one_connection_and_is_logged(world, serving, caplog, eventually):
    with serving(world) as server, Client(server.url) as client, Client(server.url) as other:
        client.start("a", png())
        other.start("a", png())
        fail_in(world.engine, "denoise_first", ZeroDivisionError("a bug"))
        with pytest.raises(ConnectionClosed) as closed:
            client.chunk()
        # The client learns that, and the log learns what.
        assert closed.value.rcvd.code == 1011 and "bug" not in closed.value.rcvd.reason
        assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)
        assert other.chunk()
        eventually(lambda: len(server.sessions) == 1)


def test_a_client_that_vanishes_frees_its_world_after_a_while(world, serving, eventually):
    with serving(world, Limits(sessions=1, linger_s=0.3)) as server:
        client = Client(server.url)
        client.start("a", png())
        client.send("more", chunks=2)
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: server.metric("sanawm_sessions_ended_total", reason="vanished") == 1)
        assert len(server.sessions) == 0
        eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "sanawm-live"])
        # And nobody computes for it meanwhile.
        count = len(world.engine.calls)
        time.sleep(0.2)
        assert len(world.engine.calls) == count


def test_a_world_that_waits_for_nobody_waits_for_a_client_that_is_away(world, serving, eventually):
    slow(world.engine, "commit", 0.02)
    with serving(world, Limits(sessions=1, linger_s=20)) as server:
        client = Client(server.url)
        client.start("a", png(), full="drop", at_end="continue")
        client.chunk()
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: server.sessions._away)
        time.sleep(0.3)  # the chunk in progress is finished
        count = len(world.engine.calls)
        time.sleep(0.3)
        assert len(world.engine.calls) == count


def test_a_client_that_vanishes_while_its_world_starts_leaves_nothing(world, serving, eventually, monkeypatch):
    made = []
    start = world.start
    monkeypatch.setattr(world, "start", lambda *arguments, **options: made.append(start(*arguments, **options)) or made[-1])
    started = threading.Event()
    released = threading.Event()

    def wait(name):
        if name == "image_encoder":
            started.set()
            released.wait(10)

    world.engine.before_run = wait
    with serving(world, Limits(sessions=1, linger_s=0.1)) as server:
        client = Client(server.url)
        client.socket.send(png())
        client.send("start", prompt="a", image="upload")
        assert started.wait(10)
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: not server.app.state.gate.open)
        released.set()
        world.engine.before_run = lambda name: None
        eventually(lambda: len(server.sessions) == 0)
        eventually(lambda: made and made[0].closed)
        with Client(server.url) as other:
            other.start("b", png())
            assert other.chunk()


def test_what_is_far_too_large_is_not_taken_in(world, serving):
    with serving(world, Limits(image_bytes=2**20)) as server, Client(server.url) as other:
        client = Client(server.url)
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.send(bytes(2**25))
            client.wait_for("nothing")
        # The server hangs up on what it does not read, and the reset may overtake its close frame.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        other.start("a", png())
        assert other.chunk()


def send_frame(link, kind, payload):
    """A masked WebSocket frame, by hand."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2, "big")
    link.sendall(bytes([0x80 | kind]) + length + bytes(4) + payload)


def deaf_client(server):
    """A socket that has done the handshake and reads nothing from then on; its receive buffer is small."""
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect((host, port))
    link.sendall(
        f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert link.recv(4096).startswith(b"HTTP/1.1 101")
    return link


def test_a_client_that_does_not_read_is_given_up_and_holds_up_nobody(world, serving, eventually):
    with serving(world, Limits(sessions=2, send_s=1.0, linger_s=0.2, window=1000)) as server, Client(server.url) as other:
        other.start("b", png(), at_end="continue")
        with deaf_client(server) as deaf:
            for message in ({"type": "hello", "protocol": 1}, png(32, 32), {"type": "start", "prompt": "a", "format": "rgb"}):
                send_frame(deaf, 2 if isinstance(message, bytes) else 1, message if isinstance(message, bytes) else json.dumps(message).encode())
            eventually(lambda: len(server.sessions) == 2)
            send_frame(deaf, 1, b'{"type": "more", "chunks": 1000}')
            begin = time.monotonic()
            served = 0
            while server.metric("sanawm_sessions_ended_total", reason="vanished") < 1:
                other.chunk()
                served += 1
                time.sleep(0.02)  # within the rate of messages
                assert time.monotonic() - begin < 30, "the deaf client was never given up"
        assert served >= 3 and len(server.sessions) == 1


def test_a_slow_viewer_does_not_pile_up_chunks(world, serving, eventually):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        client.chunk()
        client.send("more", chunks=2)
        eventually(lambda: server.metric("sanawm_chunks_total") == 3)
        (session,) = server.sessions._sessions.values()
        time.sleep(0.3)
        assert session.live.stats().made == 3 and session.live.stats().waiting == 0


@pytest.fixture
def jumping_clock(monkeypatch):
    """The machine's clock jumps by days, back and forth, at every look."""
    real, looks = time.time, [0]

    def look():
        looks[0] += 1
        return real() + 86_400 * ((-1) ** looks[0]) * looks[0]

    monkeypatch.setattr(time, "time", look)
    monkeypatch.setattr(time, "time_ns", lambda: int(look() * 1e9))


def test_a_jumping_clock_does_not_stretch_a_tap(jumping_clock):
    keys = HeldKeys(16)
    for key in "wd":  # each look at the clock jumps the other way
        keys.set(key)
        keys.set("")
        time.time()
    taken = keys.take(24)
    assert [sum(key in held for held in taken) for key in "wd"] == [4, 4]


def test_a_jumping_clock_changes_nothing(world, serving, jumping_clock, eventually, caplog):
    caplog.set_level("INFO", "sanawm")
    assert abs(time.time() - time.time()) > 80_000
    rate = Rate(10)
    assert [rate.allow() for _ in range(35)].count(True) in range(30, 33)
    with serving(world, Limits(idle_s=30, linger_s=3)) as server:
        client = Client(server.url)
        client.start("a", png())
        for number in range(4):
            facts = client.chunk().facts
            assert facts["chunk"] == number and not facts["behind"] and facts["late_s"] < 1
            assert 0 <= facts["encode_s"] < 5 and all(0 <= value < 5 for value in (facts["waited_s"], *facts["seconds"].values()))
        eventually(lambda: server.metric("sanawm_chunks_total") == 4)
        assert 0 < server.metric("sanawm_latency_seconds_sum") < 20
        (started,) = [record for record in caplog.records if record.message == "session_started"]
        assert 0 <= started.seconds < 5
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: server.sessions._away)
        with Client(server.url) as again:
            assert again.rejoin(client.session, client.key)
            assert again.chunk().facts["chunk"] == 4


def spawn(bundle, *arguments, seconds="0.02"):
    command = [sys.executable, COMMAND, seconds, "serve", str(bundle), "--port", "0", "--json", *arguments]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_server_in_order(toy_bundle, number):
    process, ready = spawn(toy_bundle)
    assert ready["event"] == "ready" and ready["token"] is None
    with Client(ready["url"]) as client:
        client.start("a", png())
        client.chunk()
        process.send_signal(number)
        with pytest.raises(ConnectionClosed) as closed:
            for _ in range(1000):
                client.chunk()
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the server is stopping")
    _, errors = process.communicate(timeout=30)
    events = [json.loads(line) for line in errors.splitlines()]
    assert process.returncode == 0
    assert [event["event"] for event in events][-1] == "stopped" and not any("traceback" in event for event in events)
    assert next(event for event in events if event["event"] == "stopping")["signal"] == signal.Signals(number).name


def test_a_signal_ends_the_worlds_of_those_who_are_away_too(toy_bundle, eventually):
    process, ready = spawn(toy_bundle)
    client = Client(ready["url"])
    client.start("a", png(), full="drop", at_end="continue")
    client.chunk()
    client.socket.socket.shutdown(socket.SHUT_RDWR)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    eventually(lambda: json.load(direct.open(ready["url"] + "status"))["connections"] == 0)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    ended = [event for event in map(json.loads, errors.splitlines()) if event["event"] == "session_ended"]
    assert process.returncode == 0 and [event["reason"] for event in ended] == ["shutdown"]


def test_a_server_in_the_middle_of_a_long_chunk_still_stops(toy_bundle):
    process, ready = spawn(toy_bundle, seconds="1.5")
    with Client(ready["url"]) as client:
        client.start("a", png())
        client.send("more")
        time.sleep(0.3)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0 and time.monotonic() - begin < 15


def test_an_address_in_use_is_a_sentence(toy_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, COMMAND, "0", "serve", toy_bundle, "--port", taken.getsockname()[1]]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot listen on 127.0.0.1 port" in done.stderr and "Traceback" not in done.stderr


def test_other_addresses_get_a_token_of_their_own(toy_bundle):
    process, ready = spawn(toy_bundle, "--host", "0.0.0.0")
    try:
        assert len(ready["token"]) >= 24
        url = ready["url"].replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(ConnectionClosed) as closed:
            Client(url)
        assert closed.value.rcvd.code == 1008
        with Client(url, ready["token"]) as client:
            assert client.welcome["world"]["name"] == "toy"
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert ready["token"] not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--token", "short"], "16 characters"),
        (["--certificate", __file__], "--certificate-key"),
        (["--certificate", __file__, "--certificate-key", __file__], "no certificate chain"),
        (["--origin", "example.org"], "https://example.org"),
        (["--port", "99999"], "0<=x<=65535"),
        (["--threads", "0"], "x>=1"),
    ],
)
def test_bad_options_are_sentences(toy_bundle, arguments, words):
    command = [sys.executable, COMMAND, "0", "serve", toy_bundle, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr

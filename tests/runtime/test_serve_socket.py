"""The WebSocket end to end on the toy world: starting, steering, recording, limits, refusals, coming back."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import time

import numpy as np
import pytest
import toy
from PIL import Image
from toy import png
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sanawm.errors import EngineError
from sanawm_runtime.serve.client import Client, ServerError
from sanawm_runtime.serve.limits import Limits
from sanawm_runtime.serve.protocol import VERSION


@contextlib.contextmanager
def raw(server, *messages, hello=True, **options):
    """A bare connection that has sent these messages."""
    with connect(server.url.replace("http", "ws") + "/ws", max_size=None, proxy=None, **options) as socket_:
        if hello:
            socket_.send(json.dumps({"type": "hello", "protocol": VERSION}))
            assert json.loads(socket_.recv(10))["type"] == "welcome"
        for message in messages:
            socket_.send(message if isinstance(message, (str, bytes)) else json.dumps(message))
        yield socket_


def close_code(socket_, seconds=10.0):
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            socket_.recv(seconds)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def test_it_streams_what_an_embedded_stream_makes(world, serving):
    image = png()
    stream = world.start(image, "a plain", seed=7)
    with serving(world) as server, Client(server.url) as client:
        assert client.welcome["world"] == {"name": "toy", "width": 64, "height": 64, "fps": 16}
        client.start("a plain", image, seed=7, format="rgb")
        client.hold("wd")
        for _ in range(3):
            chunk, expected = client.chunk(), stream.hold("wd")
            assert np.array_equal(chunk.frames, expected.frames)
            np.testing.assert_allclose(chunk.poses, expected.poses[:, :3], atol=1e-6)  # poses travel as float32
            assert chunk.facts["chunk"] == expected.index and chunk.facts["start"] == expected.start


def test_frames_come_as_jpeg(world, serving):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png(), seed=7)
        chunk = client.chunk()
        expected = world.start(png(), "a", seed=7).hold("").frames
        for body, frame in zip(chunk.frames, expected, strict=True):
            decoded = np.asarray(Image.open(io.BytesIO(body)), np.int16)
            assert np.abs(decoded - frame).mean() < 4  # quality 90


def test_nothing_is_made_that_was_not_asked_for(world, serving, eventually):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        time.sleep(0.3)
        assert server.metric("sanawm_chunks_total") == 0 and "denoise_first" not in [name for name, _ in world.engine.calls]
        client.send("more", chunks=1000)  # more than the window counts as the window
        eventually(lambda: server.metric("sanawm_chunks_total") == 2)
        time.sleep(0.3)
        assert server.metric("sanawm_chunks_total") == 2


def test_a_dropping_session_goes_on_without_its_client(world, serving, eventually):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png(), full="drop")
        client.chunk()
        (session,) = server.sessions._sessions.values()
        eventually(lambda: session.live.stats().dropped >= 3)
        chunk = client.chunk()
        assert chunk.facts["chunk"] >= 3 and chunk.facts["dropped"] >= 3
        assert server.metric("sanawm_chunks_dropped_total") >= 3


def test_pause_resume_reset_and_stop(world, serving):
    with serving(world) as server, Client(server.url, timeout_s=10) as client:
        client.start("a", png(), seed=1)
        client.chunk()
        client.send("pause")
        client.send("more")
        client.send("ping")
        client.wait_for("pong")
        with pytest.raises(TimeoutError):
            client.socket.recv(0.3)
        client.send("resume")
        assert client.chunk(ask=False).facts["chunk"] == 1
        client.send("reset", seed=2)
        assert client.chunk().facts["chunk"] == 0
        client.send("stop")
        client.send("reset")
        with pytest.raises(ServerError, match="no world is running"):
            client.wait_for("chunk")
        assert len(server.sessions) == 0


def test_a_recording_is_a_video(world, serving, tmp_path):
    from sanawm_runtime.video import probe_video

    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        client.chunk()
        client.send("record", on=True)
        for _ in range(3):
            client.chunk()
        client.send("record", on=False)
        client.wait_for("recording")
    (tmp_path / "clip.mp4").write_bytes(client.recording)
    facts = probe_video(tmp_path / "clip.mp4")
    assert (facts["frames"], facts["width"], facts["height"], facts["fps"]) == (72, 64, 64, 16.0)


def test_a_recording_that_fails_leaves_the_stream(world, serving, monkeypatch):
    def fail(*arguments):
        raise EngineError("no encoder here")

    monkeypatch.setattr("sanawm_runtime.serve.session.FragmentEncoder", fail)
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        client.send("record", on=True)
        client.chunk()
        with pytest.raises(ServerError, match="no encoder here"):
            client.wait_for("chunk")
        assert client.chunk().facts["chunk"] == 1


def test_the_end_of_the_time_axis_is_told(world, serving):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        client.chunk()
        client.chunk()
        (session,) = server.sessions._sessions.values()
        session.live.stream._rollout.chunks = 340
        assert client.chunk().facts["last"]
        assert client.chunk() is None and client.ended == "time axis"
        client.send("reset")
        assert client.chunk().facts["chunk"] == 0


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"image": "/etc/passwd"}, "no sample of that name"),
        ({"image": "../../manifest.json"}, "no sample of that name"),
        ({"image": "upload"}, "no image was uploaded"),
        ({"prompt": "x" * 4001}, "4,000 are allowed"),
        ({"scheme": "none-such"}, "unknown action scheme"),
        ({"fov": 1.0}, "field of view"),
        ({"fov": 1e308}, "field of view"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_sentence(world, serving, request_, words):
    with serving(world) as server, Client(server.url) as client:
        if "image" not in request_:
            client.socket.send(png())
        client.send("start", **{"prompt": "a", "image": "upload", **request_})
        with pytest.raises(ServerError, match=words):
            client.wait_for("started")
        client.start("a", png())  # the connection is as good as before
        assert client.chunk() and len(server.sessions) == 1


def test_samples_start_without_an_upload(world, serving):
    with serving(world) as server, Client(server.url) as client:
        samples = client.welcome["samples"]
        assert samples and all(sample["prompt"] for sample in samples)
        client.start("a", samples[0]["name"])
        assert client.chunk()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an image"),
        (b"GIF89a" + bytes(100), "not an image"),
        (png()[:200], "damaged or truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(4), "pixels|not an image"),
        (png(5000, 5000, compress_level=1)[:500_000], "24,000,000 pixels"),
    ],
)
def test_hostile_images_are_refused_before_they_are_decoded(world, serving, data, words):
    with serving(world, Limits(image_bytes=2**20)) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match=words):
            client.start("a", data)
        assert len(server.sessions) == 0


def test_a_compressed_bomb_costs_nothing(world, serving):
    # 81 MB of black in less than a megabyte: refused by what its header says.
    black = io.BytesIO()
    Image.new("L", (9_000, 9_000)).save(black, "PNG", compress_level=9)
    assert len(black.getvalue()) < 2**20
    with serving(world, Limits(image_pixels=10**6)) as server, Client(server.url) as client:
        begin = time.monotonic()
        with pytest.raises(ServerError, match="9000x9000 is more than 1,000,000 pixels"):
            client.start("a", black.getvalue())
        assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("not json", 1008),
        ("{}", 1008),
        ('{"type": "none"}', 1008),
        ('{"type": "keys", "held": 5}', 1008),
        ('{"type": "keys", "held": "w", "more": 1}', 1008),
        ('{"type": "hello", "protocol": 1}', 1008),
        ("x" * 70_000, 1008),
        (bytes(2**20 + 1), 1009),
    ],
)
def test_what_the_protocol_does_not_allow_ends_the_connection(world, serving, message, code):
    with serving(world, Limits(image_bytes=2**20)) as server, raw(server, message) as socket_:
        assert close_code(socket_)[0] == code


def test_the_first_message_is_hello(world, serving):
    with serving(world, Limits(hello_s=0.3)) as server:
        with raw(server, {"type": "ping"}, hello=False) as socket_:
            assert close_code(socket_) == (1008, "the first message must be hello")
        with raw(server, {"type": "hello", "protocol": 99}, hello=False) as socket_:
            assert close_code(socket_)[0] == 1008
        with raw(server, hello=False) as socket_:
            assert close_code(socket_) == (1008, "no hello in time")


def test_unknown_keys_are_an_error_not_an_end(world, serving):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        client.hold("xyz")
        with pytest.raises(ServerError, match="unknown key"):
            client.chunk()
        assert client.chunk(ask=False)


def test_too_many_messages_end_the_connection(world, serving):
    with serving(world, Limits(messages_per_s=20)) as server, raw(server) as socket_:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(200):
                socket_.send('{"type": "ping"}')
        code, reason = close_code(socket_)
        assert (code, reason) == (1008, "more than 20 messages a second")
        assert server.metric("sanawm_refused_total", reason="rate") == 1


def test_an_idle_connection_ends(world, serving):
    with serving(world, Limits(idle_s=0.3)) as server, raw(server) as socket_:
        assert close_code(socket_) == (1008, "idle for too long")


def test_sessions_are_limited_and_free_again(world, serving, eventually):
    with serving(world, Limits(sessions=2)) as server:
        with Client(server.url) as one, Client(server.url) as two:
            one.start("a", png())
            two.start("a", png())
            with raw(server, png(), {"type": "start", "prompt": "a"}) as third:
                code, reason = close_code(third)
            assert code == 1013 and reason == "all 2 sessions are in use; try again later"
            assert server.metric("sanawm_refused_total", reason="sessions") == 1
            # A second world of the same client takes the place of its first.
            two.start("b", png())
            assert two.chunk() and one.chunk() and len(server.sessions) == 2
        eventually(lambda: len(server.sessions) == 0)
        with Client(server.url) as again:
            again.start("a", png())
            assert again.chunk()


def test_connections_are_limited(world, serving):
    with serving(world, Limits(connections=1)) as server, Client(server.url):
        with raw(server, hello=False) as second:
            assert close_code(second)[0] == 1013


def test_a_token_is_asked_for(world, serving):
    with serving(world, token="0123456789abcdef") as server:
        for token in ("", "0123456789abcdeF", "0123456789abcdef\u0000"):
            with pytest.raises(ConnectionClosed) as closed:
                Client(server.url, token)
            assert closed.value.rcvd.code == 1008 and "token" in closed.value.rcvd.reason
        with Client(server.url, "0123456789abcdef") as client:
            client.start("a", png())
            assert client.chunk()


@pytest.mark.parametrize("headers", [{"Origin": "https://example.org"}, {"Host": "example.org"}, {"Origin": "null"}])
def test_foreign_pages_are_kept_out(world, serving, headers):
    with serving(world) as server, pytest.raises(InvalidStatus) as refused:
        if "Host" in headers:
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as link:
                with connect("ws://example.org/ws", sock=link, proxy=None):
                    raise AssertionError("connected under a foreign name")
        with raw(server, additional_headers=headers):
            raise AssertionError("connected from a foreign page")
    assert refused.value.response.status_code == 403


def test_the_own_page_and_named_origins_may_connect(world, serving):
    with serving(world, origins=["https://studio.example"]) as server:
        for origin in (server.url, "https://studio.example"):
            with raw(server, additional_headers={"Origin": origin}):
                assert True


def test_a_lost_client_comes_back_to_its_world(world, serving, eventually):
    with serving(world) as server:
        client = Client(server.url)
        client.start("a", png(), seed=3)
        client.hold("w")
        first = [client.chunk().facts["chunk"] for _ in range(2)]
        client.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        eventually(lambda: server.sessions._away)
        with Client(server.url) as again:
            assert again.rejoin(client.session, client.key)["rejoined"]
            again.hold("w")
            assert [first, again.chunk().facts["chunk"]] == [[0, 1], 2]
            assert len(server.sessions) == 1


def test_only_its_own_client_gets_a_world_back(world, serving, eventually):
    with serving(world) as server:
        client = Client(server.url)
        client.start("a", png())
        with Client(server.url) as other, pytest.raises(ServerError, match="session is over"):
            other.rejoin(client.session, client.key)  # it is not away
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: server.sessions._away)
        for name, key in ((client.session, "x" * 32), ("00000000", client.key), (client.session, "\u20ac")):
            with Client(server.url) as other, pytest.raises(ServerError, match="session is over"):
                other.rejoin(name, key)
        with Client(server.url) as again:
            again.rejoin(client.session, client.key)


def test_who_leaves_on_purpose_frees_the_world_at_once(world, serving, eventually):
    with serving(world) as server:
        with Client(server.url) as client:
            client.start("a", png())
            client.chunk()
        eventually(lambda: len(server.sessions) == 0)
        assert server.metric("sanawm_sessions_ended_total", reason="left") == 1


def test_a_lost_world_gives_way_to_a_new_client(world, serving, eventually):
    with serving(world, Limits(sessions=1, linger_s=60)) as server:
        client = Client(server.url)
        client.start("a", png())
        client.socket.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: server.sessions._away)
        with Client(server.url) as other:
            other.start("b", png())
            assert other.chunk()
        assert server.metric("sanawm_sessions_ended_total", reason="replaced") == 1


def test_twenty_clients_share_one_engine(world, serving):
    import threading

    toy.slow(world.engine, "decode", 0.002)
    with serving(world, Limits(sessions=20)) as server:
        counts = [0] * 20
        stop = threading.Event()

        def run(number):
            with Client(server.url) as client:
                client.start("a", png(), seed=number)
                while not stop.is_set():
                    client.chunk()
                    counts[number] += 1

        threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        while sum(counts) < 200 and any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
        with Client(server.url) as extra, pytest.raises(ConnectionClosed) as refused:
            extra.start("a", png())
        assert refused.value.rcvd.code == 1013
        stop.set()
        for thread in threads:
            thread.join(30)
    # First come, first served: nobody gets much more than another.
    assert min(counts) >= max(counts) // 2 - 2 and min(counts) > 0, counts

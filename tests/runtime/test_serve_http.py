"""Pages, metrics and health over HTTP; hosts, tokens, and that no path leads to the file system."""

from __future__ import annotations

import http.client
import io
import json
import re
import urllib.request

import pytest
from PIL import Image
from toy import png

from sanawm_runtime.serve.client import Client
from sanawm_runtime.serve.guard import host_of


def get(server, path, headers=None, method="GET"):
    """A request whose path goes out exactly as written."""
    link = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    link.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
    for name, value in (headers or {}).items():
        link.putheader(name, value)
    link.endheaders()
    response = link.getresponse()
    return response.status, dict(response.headers), response.read()


def test_the_page_and_everything_it_names_is_served(world, serving):
    with serving(world) as server:
        status, headers, body = get(server, "/")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
        # Nothing is loaded from elsewhere, in the page or by its modules.
        names = re.findall(r'(?:src|href)="([^"#][^"]*)"', body.decode())
        assert {"page/style.css", "page/app.js", "page/icon.svg"} == set(names)
        todo, seen = list(names), set()
        while todo:
            name = todo.pop()
            status, headers, body = get(server, f"/{name}")
            assert status == 200, name
            seen.add(name)
            assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", body), name
            if name.endswith(".js"):
                assert headers["content-type"].startswith("text/javascript")
                todo += {f"page/{other}" for other in re.findall(r'from "\./([a-z]+\.js)"', body.decode())} - seen
        assert len(seen) == 11


def test_headers_keep_the_page_to_itself(world, serving):
    with serving(world) as server:
        headers = get(server, "/")[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
        etag = headers["etag"]
        assert get(server, "/", {"If-None-Match": etag})[0] == 304


@pytest.mark.parametrize(
    "path",
    [
        "/page/../../../../../../etc/passwd",
        "/page/..%2f..%2f..%2fetc%2fpasswd",
        "/page/%2e%2e/app.py",
        "/page/....//app.py",
        "/page//etc/passwd",
        "/page/app.js%00.png",
        "/page/",
        "/samples/../first_frames.json",
        "/samples/plain.png",
        "/samples/%2fetc%2fpasswd",
        "/manifest.json",
        "/../manifest.json",
        "/page/C:%5cwindows%5cwin.ini",
        "/page/" + "a" * 6000,
    ],
)
def test_no_path_reaches_the_file_system(world, serving, path, monkeypatch):
    with serving(world) as server:
        opened = []
        real = open

        def watch(name, *arguments, **options):
            opened.append(name)
            return real(name, *arguments, **options)

        monkeypatch.setattr("builtins.open", watch)
        status, _, body = get(server, path)
        monkeypatch.undo()
        assert status in (404, 400) and b"root:" not in body and not opened


def test_samples_have_thumbnails(world, serving):
    with serving(world) as server, Client(server.url) as client:
        for sample in client.welcome["samples"]:
            status, headers, body = get(server, f"/samples/{sample['name']}")
            assert status == 200 and headers["content-type"] == "image/jpeg"
            assert max(Image.open(io.BytesIO(body)).size) <= 480


def test_metrics_count_what_happened(world, serving, eventually):
    with serving(world) as server:
        with Client(server.url) as client:
            client.start("a", png())
            for _ in range(3):
                client.chunk()
            text = get(server, "/metrics")[2].decode()
            assert "sanawm_sessions 1.0" in text and "sanawm_connections 1.0" in text
        eventually(lambda: server.metric("sanawm_sessions_ended_total", reason="left") == 1)
        status, headers, body = get(server, "/metrics")
        text = body.decode()
        assert status == 200 and headers["content-type"].startswith("text/plain")
        assert "sanawm_chunks_total 3.0" in text and "sanawm_frames_total 73.0" in text
        assert 'sanawm_stage_seconds_count{stage="denoise"} 3.0' in text
        assert "process_resident_memory_bytes" in text
        assert server.metric("sanawm_latency_seconds_count") == 3 and server.metric("sanawm_sent_bytes_total") > 73 * 72


def test_a_timeline_is_drawn_of_what_ran(world, serving):
    with serving(world) as server, Client(server.url) as client:
        assert get(server, "/timeline.png")[0] == 404
        client.start("a", png())
        client.chunk()
        status, headers, body = get(server, "/timeline.png")
        assert status == 200 and Image.open(io.BytesIO(body)).size == (1840, 800)


def test_status_and_health(world, serving):
    with serving(world) as server, Client(server.url) as client:
        client.start("a", png())
        status = json.loads(get(server, "/status")[2])
        assert status["sessions"] == 1 and status["connections"] == 1 and status["world"]["digest"] == world.bundle.digest
        assert json.loads(get(server, "/healthz")[2]) == {"status": "ok"}


def test_a_token_guards_all_but_the_page(world, serving):
    token = "0123456789abcdef"
    with serving(world, token=token, hosts=None) as server:
        assert get(server, "/")[0] == get(server, "/healthz")[0] == 200
        for path in ("/metrics", "/status", "/timeline.png"):
            assert get(server, path)[0] == 401
            assert get(server, path, {"Authorization": "Bearer wrong"})[0] == 401
            assert get(server, path, {"Authorization": f"Bearer {token}"})[0] in (200, 404)
        # The page does not know it either.
        assert token.encode() not in get(server, "/")[2]


@pytest.mark.parametrize(("host", "status"), [("example.org", 403), ("localhost:8960", 200), ("[::1]:80", 200), ("127.0.0.1", 200), ("", 403)])
def test_it_answers_under_its_own_names_only(world, serving, host, status):
    with serving(world) as server:
        assert get(server, "/", {"Host": host})[0] == status


def test_pages_of_other_origins_get_nothing(world, serving):
    with serving(world) as server:
        assert get(server, "/status", {"Origin": "https://example.org"})[0] == 403
        assert urllib.request.urlopen(f"{server.url}/status").status == 200


@pytest.mark.parametrize(
    ("text", "host"), [("a:1", "a"), ("A", "a"), ("[::1]:80", "::1"), ("", ""), ("[", ""), ("a@b", "b"), ("x/y", "x"), ("a:b:c", "a")]
)
def test_hosts_are_read_from_anything(text, host):
    assert host_of(text) == host


def test_other_methods_are_refused(world, serving):
    with serving(world) as server:
        for path in ("/", "/metrics", "/page/app.js"):
            assert get(server, path, method="POST")[0] == 405

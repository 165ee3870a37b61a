"""Everything that reads what strangers write: any input gives a value or one of our errors, soon, and nothing else.

SANAWM_FUZZ_CASES sets the cases of each reader; `docs/serve.md` says what a long run found.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hostile import cases, changed_bytes, changed_json
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sanawm.camera import load_image, load_intrinsics, load_poses, parse_actions
from sanawm.errors import BundleError, CameraError, InputError, UserError
from sanawm_runtime import World
from sanawm_runtime.bundle.manifest import MANIFEST_NAME, parse_manifest
from sanawm_runtime.cache import Cache
from sanawm_runtime.held import HeldKeys
from sanawm_runtime.serve.protocol import HEADER_BYTES, Header, ProtocolError, parse_message, unpack
from sanawm_runtime.sign import parse_signatures


@pytest.fixture(scope="module")
def manifest_tree(toy_bundle):
    tree = json.loads((toy_bundle / MANIFEST_NAME).read_text())
    # Two programs are as good as thirteen, and quicker to change.
    tree["programs"] = {name: tree["programs"][name] for name in ("text_encoder", "decode")}
    return tree


def check_manifest(data):
    try:
        manifest = parse_manifest(data)
    except BundleError as error:
        assert str(error) and "\x00" not in str(error)
        return
    assert parse_manifest(manifest.to_bytes()) == manifest


@cases()
@given(st.data())
def test_manifests_with_changed_values(manifest_tree, data):
    check_manifest(data.draw(changed_json(manifest_tree)))


@cases()
@given(st.data())
def test_manifests_with_changed_bytes(manifest_tree, data):
    check_manifest(data.draw(changed_bytes(json.dumps(manifest_tree).encode())))


@cases()
@given(st.binary(max_size=400) | st.text(max_size=400).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b"1" * 100_000)
@example(b"\xef\xbb\xbf{}")
def test_manifests_of_anything(data):
    check_manifest(data)


@cases(0.2)
@given(data=st.data())
def test_worlds_with_changed_manifests(toy_bundle, toy_engine, data):
    tree = json.loads((toy_bundle / MANIFEST_NAME).read_text())
    changed = data.draw(changed_json(tree))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "bundle")
        root.mkdir()
        for name in ("programs", "prompt"):
            (root / name).symlink_to(toy_bundle / name)
        (root / MANIFEST_NAME).write_bytes(changed)
        try:
            World.open(root).close()
        except UserError as error:
            assert str(error)


SIGNATURES = {"signatures": [{"key": "0" * 64, "signature": "A" * 86 + "==", "algorithm": "ed25519"}], "schema_version": 1}


@cases()
@given(changed_json(SIGNATURES) | changed_bytes(json.dumps(SIGNATURES).encode()) | st.binary(max_size=200))
def test_signatures(data):
    try:
        found = parse_signatures(data)
    except BundleError as error:
        assert str(error)
        return
    assert 1 <= len(found) <= 16


MESSAGES = [
    {"type": "hello", "protocol": 1, "token": "x"},
    {"type": "start", "prompt": "a plain", "image": "upload", "seed": 1, "fov": 70.0, "scheme": "official-2026-08", "full": "wait", "at_end": "stop"},
    {"type": "rejoin", "session": "00", "key": "00"},
    {"type": "keys", "held": "wd"},
    {"type": "more", "chunks": 1},
    {"type": "reset", "seed": 3},
    {"type": "record", "on": True},
    {"type": "pause"},
]


def check_message(text):
    try:
        message = parse_message(text, 4096)
    except ProtocolError as error:
        assert str(error) and len(str(error)) < 600
        return
    assert len(text.encode()) <= 4096
    if hasattr(message, "held"):
        try:
            HeldKeys(16).set(message.held)
        except CameraError as error:
            assert str(error)


@cases()
@given(st.sampled_from(MESSAGES).flatmap(changed_json))
def test_messages_with_changed_values(data):
    check_message(data.decode())


@cases()
@given(st.sampled_from(MESSAGES).flatmap(lambda tree: changed_bytes(json.dumps(tree).encode())) | st.binary(max_size=300))
def test_messages_with_changed_bytes(data):
    check_message(data.decode("utf-8", "surrogateescape"))


@cases()
@given(st.text(max_size=300))
@example("[" * 4096)
@example('{"type":"keys","held":"' + "w" * 5000 + '"}')
@example('{"type":"keys","type":"start"}')
def test_messages_of_anything(text):
    check_message(text)


HEADER = Header(1, 2, 3, 64, 64, 5, np.zeros((3, 4), np.float32)).pack()


@cases()
@given(changed_bytes(HEADER + b"body") | st.binary(max_size=200))
def test_binary_messages(data):
    try:
        header, body = unpack(data)
    except ProtocolError as error:
        assert str(error)
        return
    # Nothing is read beyond the end, and the body begins behind the header.
    assert data.endswith(body) and len(body) <= len(data) - HEADER_BYTES and header.kind in (1, 2, 3)


LETTERS = st.text("wasdijklnoeWASD-,:0123456789 \t\uff0c.official2026", max_size=60)


@cases()
@given(LETTERS | st.text(max_size=60) | st.lists(st.tuples(LETTERS, st.integers(-3, 10**30))).map(lambda s: ",".join(f"{k}-{n}" for k, n in s)))
@example("w-" + "9" * 100_000)
@example("official-2026-05:" * 1000)
@example("w-\u0663")
@example("w-1," * 100_000)
def test_action_strings(text):
    try:
        steps = parse_actions(text)
    except CameraError as error:
        assert str(error) and len(str(error)) < 500
        return
    assert sum(frames for _, frames in steps) <= 100_000 and all(frames > 0 for _, frames in steps)


def poses_file(suffix):
    poses = np.tile(np.eye(4), (3, 1, 1))
    if suffix == ".npy":
        out = io.BytesIO()
        np.save(out, poses)
        return out.getvalue()
    if suffix == ".json":
        return json.dumps(poses.tolist()).encode()
    return "\n".join(" ".join(str(number) for number in row) for row in poses.reshape(3, 16)).encode()


@cases()
@given(data=st.data(), suffix=st.sampled_from([".npy", ".json", ".txt"]))
def test_pose_files(tmp_path_factory, data, suffix):
    body = data.draw(changed_bytes(poses_file(suffix)) | st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
    place = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    place.write_bytes(body)
    try:
        poses = load_poses(place)
    except CameraError as error:
        assert str(error)
        return
    assert poses.shape[1:] == (4, 4) and np.isfinite(poses).all()


@cases()
@given(data=st.data())
def test_pose_files_with_changed_values(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "fuzz.json"
    place.write_bytes(data.draw(changed_json(np.tile(np.eye(4), (2, 1, 1)).tolist())))
    try:
        assert np.isfinite(load_poses(place)).all()
    except CameraError as error:
        assert str(error)


NPY_HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(["<f8", "<f4", "|O", "<c16", "|V8", "<M8[s]", "|S5", "<u1", "f", "", "<f8,<f8", ">f2"]),
        "fortran_order": st.sampled_from([False, True, 1, None]),
        "shape": st.lists(st.integers(-2, 2**70), max_size=4).map(tuple) | st.sampled_from([(3, 4, 4), 3, "x", (2**31, 2**31, 4)]),
    }
)


@cases()
@given(header=NPY_HEADERS, body=st.binary(max_size=64), version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
def test_npy_headers(tmp_path_factory, header, body, version):
    text = repr(header).encode() + b"\n"
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    place = tmp_path_factory.getbasetemp() / "fuzz_header.npy"
    place.write_bytes(b"\x93NUMPY" + version + size + text + body)
    try:
        load_poses(place)
    except CameraError as error:
        assert str(error)


INTRINSICS = st.one_of(
    st.text("0123456789.,-einfa ", max_size=40),
    st.lists(st.floats() | st.floats(200, 900), min_size=4, max_size=4).map(lambda numbers: ",".join(map(str, numbers))),
    st.lists(st.floats(), max_size=6).map(lambda numbers: ",".join(map(str, numbers))),
)


@cases()
@given(text=INTRINSICS, frames=st.integers(1, 50))
@example("500,500,320,192", 3)
@example("1e308,1e308,1e308,1e308", 3)
def test_intrinsics_texts(text, frames):
    try:
        # Without a comma it would be the name of a file.
        rows = load_intrinsics(text if "," in text else text + ",", frames, (640, 384))
    except CameraError as error:
        assert str(error)
        return
    assert rows.shape == (frames, 4) and np.isfinite(rows).all()


def picture(form, **options):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(out, form, **options)
    return out.getvalue()


PICTURES = [picture("PNG"), picture("JPEG"), picture("WEBP"), picture("BMP"), picture("JPEG", progressive=True), picture("WEBP", lossless=True)]


@cases()
@given(st.sampled_from(PICTURES).flatmap(changed_bytes) | st.binary(max_size=300))
def test_images(data):
    try:
        image = load_image(data, 10_000)
    except InputError as error:
        assert str(error)
        return
    assert image.mode == "RGB" and image.size[0] * image.size[1] <= 10_000


@cases()
@given(data=st.data())
def test_cache_entries(tmp_path_factory, data):
    cache = Cache(tmp_path_factory.getbasetemp() / "fuzz_cache")
    assert cache.put("key", b"value" * 20)
    place = cache._place("key")
    whole = place.read_bytes()
    place.write_bytes(data.draw(changed_bytes(whole) | st.binary(max_size=100)))
    found = cache.get("key", 100)
    assert found is None or found == b"value" * 20


@cases(0.3)
@given(data=st.data())
def test_a_server_that_gets_anything(fuzzed_server, data):
    """Sequences of changed and random messages on a real connection, mixed with sensible ones: it ends with 1008 or 1009 or goes on."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    sensible = st.sampled_from([json.dumps(message) for message in MESSAGES if message["type"] != "hello"])
    hostile = st.sampled_from(MESSAGES).flatmap(changed_json).map(bytes.decode)
    messages = data.draw(st.lists(st.one_of(sensible, hostile, st.text(max_size=30), st.binary(max_size=30), st.sampled_from(PICTURES)), max_size=8))
    with connect(fuzzed_server.url.replace("http", "ws") + "/ws", max_size=None, max_queue=None, proxy=None) as link:
        try:
            link.send('{"type": "hello", "protocol": 1}')
            for message in messages:
                link.send(message)
            link.send('{"type": "ping"}')
            while not (isinstance(answer := link.recv(20), str) and '"pong"' in answer):
                assert answer
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code in (1008, 1009, 1013), closed
    assert fuzzed_server.metric("sanawm_refused_total", reason="rate") == 0


@pytest.fixture(scope="module")
def fuzzed_server(toy_bundle):
    import toy
    from conftest import run_server

    from sanawm_runtime import engines
    from sanawm_runtime.serve.limits import Limits

    before = engines._ENGINES["onnxruntime"]
    engines._ENGINES["onnxruntime"] = toy.ToyEngine
    try:
        with World.open(toy_bundle) as world, run_server(world, Limits(sessions=3, linger_s=0.1, messages_per_s=10_000)) as server:
            yield server
            assert not world.closed
    finally:
        engines._ENGINES["onnxruntime"] = before

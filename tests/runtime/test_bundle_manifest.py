"""The manifest reader on good, bad and random input."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm.config import tiny_config
from sanawm.errors import BundleError
from sanawm_runtime.bundle import (
    SCHEMA_VERSION,
    CheckpointEntry,
    FileEntry,
    Manifest,
    PrecisionEntry,
    ProgramEntry,
    TargetEntry,
    TensorEntry,
    parse_manifest,
)
from sanawm_runtime.bundle.manifest import MAX_MANIFEST_BYTES, utc_now
from sanawm_runtime.bundle.paths import check_collisions, check_path
from sanawm_runtime.bundle.strict_json import MAX_DEPTH

HASH = "ab" * 32


def sample() -> Manifest:
    return Manifest(
        name="tiny",
        created="2026-11-23T06:00:00Z",
        config=tiny_config(),
        target=TargetEntry(name="rtx5090", engine="tensorrt_rtx", capability="sm_120"),
        precision=PrecisionEntry(recipe="mixed", summary={"nvfp4": 160, "bf16": 12}),
        programs={
            "decode.steady": ProgramEntry(
                file="programs/decode.engine",
                inputs=(TensorEntry("latent", "bfloat16", (1, 16, 1, 6, 10)),),
                outputs=(TensorEntry("frames", "uint8", (8, 192, 320, 3)),),
                extras={"workspace": 1 << 40, "nested": [{"a": 1.5}]},
            )
        },
        files={"programs/decode.engine": FileEntry(10, HASH), "weights/w.bin": FileEntry(0, HASH)},
        versions={"sanawm": "0.1.0"},
        checkpoint=CheckpointEntry(source="synth", kind="tiny", sha256=HASH),
        parity={"psnr": 31.5},
        unverified=("never run on an RTX 5090",),
    )


def document() -> dict:
    return json.loads(sample().to_bytes())


def edited(path: str, value: object) -> bytes:
    """The sample with one place (dotted path, integers index lists) set to `value`."""
    root = document()
    node = root
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        node = node[part]
    node[last] = value
    return json.dumps(root).encode()


def test_round_trip_and_stable_bytes():
    manifest = sample()
    data = manifest.to_bytes()
    assert parse_manifest(data) == manifest
    assert parse_manifest(data).to_bytes() == data
    assert manifest.total_bytes() == 10
    assert utc_now()[-1] == "Z" and dataclasses.replace(manifest, created=utc_now()).to_bytes()


def test_newer_schema_names_both_versions():
    data = edited("schema_version", SCHEMA_VERSION + 1)
    with pytest.raises(BundleError, match=r"made by a newer version \(schema 2, this runtime reads up to 1\): upgrade sanawm or rebuild"):
        parse_manifest(data)


def test_newer_schema_is_reported_before_fields_it_may_have_changed():
    root = {"schema_version": 7, "something": "new"}
    with pytest.raises(BundleError, match="newer version"):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", True, "integer schema_version"),
        ("schema_version", 0, "schema 0 does not exist"),
        ("name", 3, r"manifest.json\.name: expected text, found 3"),
        ("created", "yesterday", "expected a UTC time"),
        ("created", "2026-13-40T06:00:00Z", "expected a UTC time"),
        ("target/engine", "tvm", r"target\.engine: expected one of 'onnxruntime'"),
        ("target/capability", "120", "expected one like 'sm_120'"),
        ("target/capability", None, "the tensorrt_rtx engine is built for one"),
        ("programs/decode.steady/inputs/0/shape/1", "16", r"decode\.steady\.inputs\[0\]\.shape\[1\]: expected an integer, found \"16\""),
        ("programs/decode.steady/inputs/0/shape/1", 16.0, "expected an integer, found 16.0"),
        ("programs/decode.steady/inputs/0/shape/1", True, "expected an integer, found true"),
        ("programs/decode.steady/inputs/0/shape/1", -1, "must not be negative"),
        ("programs/decode.steady/inputs/0/dtype", "float33", "expected one of"),
        ("programs/decode.steady/inputs/0/name", "", "empty or repeated"),
        ("programs/decode.steady/file", "other.engine", "not among the manifest's files"),
        ("programs/decode.steady/outputs", {}, "expected a list, found an object"),
        ("programs/a\x1b[31m", {}, r'programs\."a\\u001b'),
        ("files/programs/decode.engine", None, None),
        ("config/dit/hidden", "128", r"config\.dit\.hidden: expected an integer"),
        ("config/dit/hidden", 129, "must be a multiple of head_dim"),
        ("config/dit/head_dim", 0, r"config\.dit: "),
        ("config/dit/unheard_of", 1, "unknown field"),
        ("config/stream/sigmas", [1.0, "0"], r"sigmas\[1\]: expected a number"),
        ("checkpoint/sha256", "AB" * 32, "64 lowercase hexadecimal digits"),
        ("unverified", "text", "expected a list"),
        ("surprise", 1, 'unknown field "surprise"'),
    ],
)
def test_a_wrong_value_is_named_by_its_path(path, value, message):
    if message is None:  # a key that itself holds a slash
        root = document()
        root["files"]["programs/decode.engine"] = value
        data, message = json.dumps(root).encode(), r"files\.programs/decode\.engine: expected an object, found null"
    else:
        data = edited(path, value)
    with pytest.raises(BundleError, match=message) as caught:
        parse_manifest(data)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("field", ["name", "config", "programs", "files", "versions", "checkpoint"])
def test_a_missing_field_is_named(field):
    root = document()
    del root[field]
    with pytest.raises(BundleError, match=f"'{field}' is missing"):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[]", "not a sanawm bundle"),
        (b'{"schema_version": 1, "schema_version": 1}', "appears twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' appears twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 99999999999999999999}', "64 bits"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "64 bits"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"\\udfff": 1}', "unpaired surrogate"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "the limit is"),
    ],
    ids=range(15),
)
def test_json_that_is_refused(data, message):
    with pytest.raises(BundleError, match=message):
        parse_manifest(data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("C:/x", "is absolute"),
        ("c:x", "is absolute"),
        ("../x", "leads out"),
        ("a/../../x", "leads out"),
        ("..", "leads out"),
        ("a\\b", "backslash"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("./a", "empty part"),
        (".hidden", "empty part"),
        ("a\nb", "character"),
        ("a\x00b", "character"),
        ("ab:stream", "character"),
        ("caf\u00e9", "character"),
        ("a b", "character"),
        ("x/NUL.txt", "not a file name on Windows"),
        ("x/trailing.", "not a file name on Windows"),
        ("a" * 129, "too long"),
        ("a/" * 300 + "a", "too long"),
    ],
)
def test_paths_that_escape_or_do_not_travel(path, message):
    root = document()
    root["files"][path] = {"size": 1, "sha256": HASH}
    with pytest.raises(BundleError, match=message):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize("path", ["a", "programs/denoise.first.onnx", "w+v/_x-1.data", "a/b/c/d.e.f"])
def test_paths_that_are_accepted(path):
    check_path(path, "test")


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["a/B", "A/b"], "differ only in case"), (["a", "a/b"], "a file and the folder"), (["x/y/z", "X/Y"], "a file and the folder")],
)
def test_names_that_collide(paths, message):
    with pytest.raises(BundleError, match=message):
        check_collisions(paths, "test")
    with pytest.raises(BundleError, match=message):
        check_collisions(reversed(paths), "test")


@pytest.mark.parametrize("name", ["manifest.json", "Manifest.JSON"])
def test_the_manifest_may_not_list_itself(name):
    root = document()
    root["files"][name] = {"size": 1, "sha256": HASH}
    with pytest.raises(BundleError, match="lists the manifest itself"):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}])
def test_a_writer_cannot_make_what_the_reader_refuses(bad):
    with pytest.raises(BundleError, match="content that JSON cannot hold"):
        dataclasses.replace(sample(), parity={"psnr": bad}).to_bytes()
    with pytest.raises(BundleError, match="leads out"):
        dataclasses.replace(sample(), files={**sample().files, "../x": FileEntry(1, HASH)}).to_bytes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def reads_or_refuses(data: bytes) -> None:
    try:
        manifest = parse_manifest(data)
    except BundleError as error:
        assert str(error).startswith("manifest.json")
    else:
        assert parse_manifest(manifest.to_bytes()) == manifest


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_only_raise_bundle_error(data):
    reads_or_refuses(data)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_random_json_only_raises_bundle_error(value):
    reads_or_refuses(json.dumps(value).encode())
    reads_or_refuses(json.dumps({"schema_version": 1, "config": value, "files": value, "programs": value}).encode())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_manifest_with_one_place_replaced_only_raises_bundle_error(data):
    root = document()
    node = root
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        child = node[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
            break
        node = child
    if isinstance(node, dict) and data.draw(st.booleans()):
        node[data.draw(st.text(max_size=12))] = node.pop(key)
    else:
        node[key] = data.draw(json_values)
    reads_or_refuses(json.dumps(root).encode())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(sample().to_bytes()) - 1), st.integers(0, 255))
def test_a_manifest_with_one_byte_changed_only_raises_bundle_error(place, byte):
    data = bytearray(sample().to_bytes())
    data[place] = byte
    reads_or_refuses(bytes(data))

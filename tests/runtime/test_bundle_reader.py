"""Opening, reading and verifying bundles, sound and damaged."""

import hashlib
import os
from pathlib import Path

import pytest

from sanawm.config import tiny_config
from sanawm.errors import BundleError
from sanawm_runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    CheckpointEntry,
    FileEntry,
    Manifest,
    PrecisionEntry,
    ProgramEntry,
    TargetEntry,
)
from sanawm_runtime.targets import check_target

CONTENT = {"programs/denoise.bin": b"denoise" * 1000, "weights/w.bin": bytes(range(256)) * 40_000, "empty.bin": b""}


def make_bundle(root: Path, **changes) -> Path:
    for name, data in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    fields = {
        "name": "tiny",
        "created": "2026-11-23T06:00:00Z",
        "config": tiny_config(),
        "target": TargetEntry("rtx5090", "cuda", "sm_120", "linux-x86_64"),
        "precision": PrecisionEntry("bf16"),
        "programs": {"denoise": ProgramEntry("programs/denoise.bin", (), ())},
        "files": {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()},
        "versions": {},
        "checkpoint": CheckpointEntry("synth", "tiny"),
    }
    (root / MANIFEST_NAME).write_bytes(Manifest(**{**fields, **changes}).to_bytes())
    return root


@pytest.fixture
def root(tmp_path):
    return make_bundle(tmp_path / "bundle")


def flip(path: Path, place: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_reads_what_was_written(root):
    bundle = Bundle.open(root, verify="full")
    for name, data in CONTENT.items():
        assert bundle.read(name) == data
        view = bundle.open_verified(name)
        assert view == data and view.readonly
    assert bundle.manifest.name == "tiny"
    assert bundle.digest == hashlib.sha256((root / MANIFEST_NAME).read_bytes()).hexdigest()
    assert bundle.verify().ok


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.write_bytes(b""), "is a file, and a bundle is a directory"),
        (lambda path: path.mkdir(), "no manifest.json in it"),
    ],
)
def test_what_is_not_a_bundle(tmp_path, prepare, message):
    prepare(tmp_path / "x")
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path / "x")


@pytest.mark.parametrize("name", ["programs/denoise.bin", "weights/w.bin"])
def test_a_flipped_byte_is_found_wherever_the_file_is_used(root, name):
    flip(root / name)
    bundle = Bundle.open(root)  # sizes still match
    with pytest.raises(BundleError, match=rf"{name} has SHA-256 .* copy the bundle again or rebuild it"):
        bundle.read(name)
    with pytest.raises(BundleError, match=f"{name} has SHA-256"):
        bundle.open_verified(name)
    with pytest.raises(BundleError, match=f"{name} has SHA-256"):
        Bundle.open(root, verify="full")
    assert [status.path for status in bundle.verify().by_state("changed")] == [name]


def test_the_last_byte_counts(root):
    flip(root / "weights/w.bin", len(CONTENT["weights/w.bin"]) - 1)
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(root).open_verified("weights/w.bin")


def test_a_missing_file(root):
    (root / "weights/w.bin").unlink()
    with pytest.raises(BundleError, match=r"the manifest names weights/w\.bin, which is missing"):
        Bundle.open(root)


def test_a_truncated_file_is_found_without_hashing(root):
    os.truncate(root / "weights/w.bin", 17)
    with pytest.raises(BundleError, match=r"has 17 bytes, and the manifest says 10,240,000"):
        Bundle.open(root)


def test_a_file_that_changes_after_opening(root):
    bundle = Bundle.open(root)
    (root / "weights/w.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match="has 5 bytes"):
        bundle.read("weights/w.bin")
    (root / "weights/w.bin").unlink()
    with pytest.raises(BundleError, match="missing"):
        bundle.open_verified("weights/w.bin")


def test_a_map_survives_replacement_of_its_file(root):
    view = Bundle.open(root).open_verified("weights/w.bin")
    other = root / "other"
    other.write_bytes(b"x" * len(view))
    os.replace(other, root / "weights/w.bin")
    assert view == CONTENT["weights/w.bin"]


@pytest.mark.parametrize("name", ["stranger.bin", "../secret", MANIFEST_NAME])
def test_nothing_outside_the_manifest_is_read(root, name):
    (root / "stranger.bin").write_bytes(b"x")
    (root.parent / "secret").write_bytes(b"x")
    bundle = Bundle.open(root)
    for read in (bundle.read, bundle.open_verified):
        with pytest.raises(BundleError, match="the manifest does not name"):
            read(name)


def test_a_link_to_a_file_outside_is_refused(root):
    secret = root.parent / "secret"
    secret.write_bytes(CONTENT["programs/denoise.bin"])
    (root / "programs/denoise.bin").unlink()
    (root / "programs/denoise.bin").symlink_to(secret)
    with pytest.raises(BundleError, match=r"programs/denoise.bin is a symbolic link"):
        Bundle.open(root)


def test_a_linked_folder_is_refused(root):
    os.rename(root / "programs", root.parent / "elsewhere")
    (root / "programs").symlink_to(root.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"programs is a symbolic link"):
        Bundle.open(root)


def test_a_linked_manifest_is_refused(root):
    os.rename(root / MANIFEST_NAME, root.parent / "m.json")
    (root / MANIFEST_NAME).symlink_to(root.parent / "m.json")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(root)


def test_a_link_put_in_place_after_opening_is_refused(root):
    bundle = Bundle.open(root)
    os.rename(root / "weights", root.parent / "elsewhere")
    (root / "weights").symlink_to(root.parent / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.read("weights/w.bin")


def test_a_bundle_reached_through_a_link_opens(root):
    link = root.parent / "link"
    link.symlink_to(root)
    assert Bundle.open(link, verify="full").read("empty.bin") == b""


def test_a_pipe_is_refused_and_does_not_hang(root):
    (root / "weights/w.bin").unlink()
    os.mkfifo(root / "weights/w.bin")
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(root)


def test_systems_without_openat_refuse_links_too(root, monkeypatch):
    monkeypatch.setattr(os, "supports_dir_fd", set())
    assert Bundle.open(root, verify="full").read("programs/denoise.bin") == CONTENT["programs/denoise.bin"]
    os.rename(root / "weights", root.parent / "elsewhere")
    (root / "weights").symlink_to(root.parent / "elsewhere")
    with pytest.raises(BundleError, match="weights is a symbolic link"):
        Bundle.open(root)
    (root / "weights").unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(root)


def test_no_descriptor_is_left_open(root):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    bundle = Bundle.open(root, verify="full")
    bundle.read("weights/w.bin")
    flip(root / "weights/w.bin")
    for call in (bundle.read, bundle.open_verified):
        with pytest.raises(BundleError):
            call("weights/w.bin")
    os.truncate(root / "weights/w.bin", 1)
    with pytest.raises(BundleError):
        Bundle.open(root)
    assert count() == before


def test_the_target_is_checked_before_any_file(root):
    (root / "weights/w.bin").unlink()
    seen = []

    def refuse(target):
        seen.append(target)
        check_target(target, "sm_89")

    with pytest.raises(BundleError, match=r"for rtx5090 \(sm_120\), and the GPU here is sm_89"):
        Bundle.open(root, target_check=refuse)
    assert seen[0].capability == "sm_120"


def test_the_schema_is_checked_before_the_target(root):
    text = (root / MANIFEST_NAME).read_text().replace('"schema_version": 1', '"schema_version": 2')
    (root / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleError, match="newer version"):
        Bundle.open(root, target_check=lambda target: pytest.fail("the target was asked"))


def test_the_report_lists_every_file(root):
    flip(root / "programs/denoise.bin")
    bundle = Bundle.open(root)
    (root / "weights/w.bin").unlink()
    (root / "weights/extra.so").write_bytes(b"x")
    (root / "linked").symlink_to("/")
    calls = []
    report = bundle.verify(lambda *call: calls.append(call))
    assert {status.path: status.state for status in report.files} == {
        "programs/denoise.bin": "changed",
        "weights/w.bin": "missing",
        "empty.bin": "ok",
        "weights/extra.so": "extra",
        "linked": "extra",
    }
    assert not report.ok
    assert "SHA-256" in report.by_state("changed")[0].detail
    assert calls[0][0] == "programs/denoise.bin" or calls[0][0] == "empty.bin"
    assert all(done <= total == bundle.manifest.total_bytes() for _, done, total in calls)


def test_the_report_explains_a_wrong_size_and_a_link(root):
    bundle = Bundle.open(root)
    os.truncate(root / "weights/w.bin", 3)
    (root / "empty.bin").unlink()
    (root / "empty.bin").symlink_to("/dev/null")
    details = {status.path: status.detail for status in bundle.verify().by_state("changed")}
    assert details["weights/w.bin"] == "has 3 bytes, and the manifest says 10,240,000"
    assert "is a symbolic link" in details["empty.bin"]


def test_extra_files_do_not_fail_a_verification(root):
    (root / "notes.txt").write_text("x")
    report = Bundle.open(root, verify="full").verify()
    assert report.ok and [status.path for status in report.by_state("extra")] == ["notes.txt"]

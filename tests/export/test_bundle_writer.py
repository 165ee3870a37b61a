"""Writing bundles: complete, atomic, and never in the way of the next build."""

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sanawm.config import tiny_config
from sanawm.errors import BundleError, UserError
from sanawm_export import bundle_writer
from sanawm_export.bundle_writer import BundleWriter
from sanawm_runtime.bundle import Bundle, CheckpointEntry, Manifest, PrecisionEntry, ProgramEntry, TargetEntry


def manifest(name: str = "tiny", file: str = "program.bin") -> Manifest:
    return Manifest(
        name=name,
        created="2026-11-23T06:00:00Z",
        config=tiny_config(),
        target=TargetEntry("cpu", "onnxruntime"),
        precision=PrecisionEntry("fp32"),
        programs={"denoise": ProgramEntry(file, (), ())},
        files={},
        versions={},
        checkpoint=CheckpointEntry("synth", "tiny"),
    )


def write(path: Path, data: bytes = b"program", **options) -> Bundle:
    with BundleWriter(path, **options) as writer:
        writer.add_bytes("program.bin", data)
        return writer.finish(manifest())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_way_to_add_a_file(tmp_path):
    sources = {how: tmp_path / f"{how}.src" for how in ("copy", "move", "link")}
    for how, source in sources.items():
        source.write_bytes(how.encode() * 1000)
    out = tmp_path / "made" / "bundle"
    with BundleWriter(out) as writer:
        writer.add_bytes("program.bin", b"program")
        for how, source in sources.items():
            writer.add_file(f"adopted/{how}.bin", source, how)
        with writer.create("weights/w.bin") as file:
            assert file.write(b"one ") == 4
            file.write(memoryview(b"two"))
        writer.path_for("tools/own.bin").write_bytes(b"written by a tool")
        assert not out.exists()
        bundle = writer.finish(manifest())
    assert bundle.root == out and bundle.verify().ok and not bundle.verify().by_state("extra")
    assert bundle.read("weights/w.bin") == b"one two"
    assert bundle.read("tools/own.bin") == b"written by a tool"
    assert all(bundle.read(f"adopted/{how}.bin") == how.encode() * 1000 for how in sources)
    assert bundle.manifest.files["program.bin"].sha256 == hashlib.sha256(b"program").hexdigest()
    assert sources["copy"].exists() and sources["link"].exists() and not sources["move"].exists()
    assert sources["link"].stat().st_ino == (out / "adopted/link.bin").stat().st_ino
    assert names(out.parent) == ["bundle"]


@pytest.mark.parametrize("how", ["move", "link"])
def test_adoption_across_file_systems_copies(tmp_path, monkeypatch, how):
    source = tmp_path / "source"
    source.write_bytes(b"program")

    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    with BundleWriter(tmp_path / "bundle") as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename" if how == "move" else "link", refuse)
            writer.add_file("program.bin", source, how)
        bundle = writer.finish(manifest())
    assert bundle.read("program.bin") == b"program"
    assert source.exists() == (how == "link")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), BundleWriter(tmp_path / "bundle") as writer:
        writer.add_bytes("program.bin", b"x")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_error_while_overwriting_leaves_the_old(tmp_path):
    write(tmp_path / "bundle", b"old")
    with pytest.raises(ZeroDivisionError), BundleWriter(tmp_path / "bundle", overwrite=True) as writer:
        writer.add_bytes("program.bin", b"new")
        raise ZeroDivisionError
    assert Bundle.open(tmp_path / "bundle").read("program.bin") == b"old"
    assert names(tmp_path) == ["bundle"]


def test_a_program_without_its_file_is_not_published(tmp_path):
    with pytest.raises(BundleError, match="not among the manifest's files"), BundleWriter(tmp_path / "bundle") as writer:
        writer.add_bytes("other.bin", b"x")
        writer.finish(manifest())
    assert names(tmp_path) == []


def test_forgetting_to_finish_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="was not finished"), BundleWriter(tmp_path / "bundle") as writer:
        writer.add_bytes("program.bin", b"x")
    assert names(tmp_path) == []


def test_a_tool_that_writes_nothing_or_too_much(tmp_path):
    with pytest.raises(UserError, match=r"No such file or directory .*tool\.bin"), BundleWriter(tmp_path / "bundle") as writer:
        writer.path_for("tool.bin")
        writer.finish(manifest(file="tool.bin"))
    with pytest.raises(RuntimeError, match=r"without being declared: tool\.bin\.data"), BundleWriter(tmp_path / "bundle") as writer:
        writer.path_for("tool.bin").write_bytes(b"x")
        (writer.partial / "tool.bin.data").write_bytes(b"x")
        writer.finish(manifest(file="tool.bin"))


@pytest.mark.parametrize(
    ("name", "error"),
    [("../x", BundleError), ("/x", BundleError), ("manifest.json", ValueError), ("program.bin", ValueError), ("PROGRAM.BIN", BundleError)],
)
def test_bad_names(tmp_path, name, error):
    with pytest.raises(error), BundleWriter(tmp_path / "bundle") as writer:
        writer.add_bytes("program.bin", b"x")
        writer.add_bytes(name, b"x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, message in (("home", "is not a bundle"), ("file", "is not a directory"), ("link", "is not a directory")):
        with pytest.raises(UserError, match=message):
            write(tmp_path / name, overwrite=overwrite)
    assert names(tmp_path) == ["file", "home", "link"] and names(tmp_path / "home") == ["thesis.tex"]


def test_an_existing_bundle_needs_overwrite(tmp_path):
    write(tmp_path / "bundle", b"old")
    with pytest.raises(UserError, match="pass --overwrite"):
        write(tmp_path / "bundle", b"new")
    assert Bundle.open(tmp_path / "bundle").read("program.bin") == b"old"
    assert write(tmp_path / "bundle", b"new", overwrite=True).read("program.bin") == b"new"
    assert names(tmp_path) == ["bundle"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    assert write(tmp_path / "bundle").read("program.bin") == b"program"


def test_a_bundle_that_appeared_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="exists"), BundleWriter(tmp_path / "bundle") as writer:
        writer.add_bytes("program.bin", b"late")
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle/manifest.json").write_text("{}")
        writer.finish(manifest())
    assert (tmp_path / "bundle/manifest.json").read_text() == "{}"


def test_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_writer, "_exchange", lambda one, other: False)
    write(tmp_path / "bundle", b"old")
    assert write(tmp_path / "bundle", b"new", overwrite=True).read("program.bin") == b"new"
    assert names(tmp_path) == ["bundle"]


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_bundle_set_aside_by_a_killed_writer_comes_back(tmp_path):
    write(tmp_path / "bundle", b"old")
    os.rename(tmp_path / "bundle", tmp_path / f"bundle.old-{dead_process()}")
    with pytest.raises(UserError, match="pass --overwrite"):
        write(tmp_path / "bundle", b"new")
    assert Bundle.open(tmp_path / "bundle").read("program.bin") == b"old"


def test_remains_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    dead, living = tmp_path / f"bundle.partial-{dead_process()}", tmp_path / f"bundle.partial-{os.getppid()}"
    other = tmp_path / f"bundle2.partial-{dead_process()}"
    for folder in (dead, living, other):
        (folder / "deep").mkdir(parents=True)
    write(tmp_path / "bundle")
    assert not dead.exists() and living.exists() and other.exists()


def test_two_writers_in_one_process(tmp_path):
    with BundleWriter(tmp_path / "bundle") as first:
        first.add_bytes("program.bin", b"first")
        with pytest.raises(UserError, match="another writer"):
            BundleWriter(tmp_path / "bundle").__enter__()
        first.finish(manifest())
    assert Bundle.open(tmp_path / "bundle").read("program.bin") == b"first"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cannot write the bundle .*: No space left"), BundleWriter(tmp_path / "bundle") as writer:
        monkeypatch.setattr(os, "fsync", full)
        writer.add_bytes("program.bin", b"x")
    assert names(tmp_path) == []


LOOP = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_bundle_writer import bundle_writer, write
if {two_renames}:
    bundle_writer._exchange = lambda one, other: False
print("go", flush=True)
for number in range(10**6):
    write(Path({path!r}), b"%d " % number * 200_000, overwrite=True)
"""


@pytest.mark.parametrize("two_renames", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_bundle(tmp_path, two_renames):
    path = tmp_path / "bundle"
    write(path, b"0 " * 200_000)
    script = LOOP.format(here=str(Path(__file__).parent), path=str(path), two_renames=two_renames)
    chance = random.Random(7)
    found = set()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if two_renames and not path.exists():
            # Only then may the bundle be elsewhere, whole, for the next writer to put back.
            (aside,) = tmp_path.glob("bundle.old-*")
            assert Bundle.open(aside).verify().ok
            continue
        bundle = Bundle.open(path, verify="full")
        assert not bundle.verify().by_state("extra")
        found.add(bundle.read("program.bin")[:8])
    assert len(found) > 1  # writers did get to replace the bundle before they were killed
    write(path, b"last", overwrite=True)
    assert names(tmp_path) == ["bundle"] and Bundle.open(path).read("program.bin") == b"last"

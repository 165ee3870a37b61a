"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sanawm.errors import UserError
from sanawm_runtime.bundle import MANIFEST_NAME, Bundle, FileEntry, Manifest
from sanawm_runtime.bundle.paths import check_collisions, check_path

if sys.platform != "win32":
    import fcntl

_BLOCK = 8 * 2**20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BundleWriter:
    """Collects files in a sibling directory and renames it into place once everything is written, hashed and on disk.

    Use as a context manager and call `finish` inside. Leaving without it, by an exception or not, removes what was written. A process
    killed at any moment leaves at `path` what was there before or the new bundle, and at most a `<path>.partial-<pid>` that the next
    writer removes. An existing bundle at `path` is refused unless `overwrite`; anything there that is not a bundle is always refused.
    Raises UserError.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        self._overwrite = overwrite
        self._files: dict[str, FileEntry | None] = {}  # None: written by someone else at `path_for`, hashed by `finish`
        self._lock = -1

    def __enter__(self) -> BundleWriter:
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _clean_up_after_the_dead(self.path)
            self._refuse_existing()
            if self.partial.exists():
                raise UserError(f"another writer of this process is writing {self.path}; give each build a directory of its own")
            self.partial.mkdir()
            self._lock = _lock(self.partial)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._lock < 0:
            return
        self._release()
        # A failure to clean up must not hide the error that led here; what stays is removed by the next writer.
        shutil.rmtree(self.partial, ignore_errors=True)
        if kind is None:
            raise RuntimeError(f"the bundle {self.path} was not finished: BundleWriter.finish was not called")

    def add_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write `data` as file `name`."""
        with self.create(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """A file to write piece by piece, hashed on the way; for content too large for memory."""
        with self._disk():
            place = self._declare(name)
            with open(place, "xb", buffering=0) as raw:
                file = HashingFile(raw)
                yield file
                os.fsync(raw.fileno())
        self._files[name] = FileEntry(file.size, file.digest.hexdigest())

    def add_file(self, name: str, source: str | os.PathLike[str], how: Literal["copy", "move", "link"] = "copy") -> None:
        """Adopt an existing file as `name`.

        "link" makes a hard link, for sources that nobody changes afterwards; "move" takes the file away. Across file systems both have to
        copy.
        """
        origin = Path(source)
        with self._disk():
            if how == "copy" or not self._rename_or_link(name, origin, how):
                with open(origin, "rb", buffering=0) as reader, self.create(name) as file:
                    while block := reader.read(_BLOCK):
                        file.write(block)
                if how == "move":
                    origin.unlink()

    def path_for(self, name: str) -> Path:
        """Where a tool that writes its own file is to put `name`; `finish` hashes it, and refuses if the tool did not write it."""
        with self._disk():
            place = self._declare(name)
        self._files[name] = None
        return place

    def finish(self, manifest: Manifest) -> Bundle:
        """Write `manifest` with the files collected here, bring everything to disk, and put the bundle in place. Returns it opened."""
        with self._disk():
            for name in [name for name, entry in self._files.items() if entry is None]:
                self._files[name] = _hash_and_sync(self.partial / name)
            entries = {name: entry for name, entry in self._files.items() if entry is not None}
            written = {place.relative_to(self.partial).as_posix() for place in self.partial.rglob("*") if not place.is_dir()}
            if stray := sorted(written - set(entries)):
                raise RuntimeError(f"written into the bundle without being declared: {', '.join(stray)}")
            data = dataclasses.replace(manifest, files=entries).to_bytes()
            with open(self.partial / MANIFEST_NAME, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for folder, _, _ in os.walk(self.partial):
                _sync_directory(Path(folder))
            self._refuse_existing()
            _publish(self.partial, self.path)
            self._release()
            _sync_directory(self.path.parent)
        return Bundle.open(self.path)

    def _declare(self, name: str) -> Path:
        check_path(name, "bundle")
        if name.lower() == MANIFEST_NAME or name in self._files:
            raise ValueError(f"{name} is already a file of this bundle")
        check_collisions([*self._files, name], "bundle")
        place = self.partial / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _rename_or_link(self, name: str, origin: Path, how: str) -> bool:
        if origin.is_symlink() or not origin.is_file():
            raise UserError(f"cannot take {origin} into the bundle: expected a regular file; give the file itself")
        place = self._declare(name)
        try:
            os.rename(origin, place) if how == "move" else os.link(origin, place)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            return False
        self._files[name] = _hash_and_sync(place)
        return True

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if self.path.is_symlink() or not self.path.is_dir():
            raise UserError(f"{self.path} exists and is not a directory; remove it or choose another output directory")
        if not any(self.path.iterdir()):
            return
        if not (self.path / MANIFEST_NAME).is_file():
            raise UserError(f"{self.path} exists and is not a bundle; choose another output directory")
        if not self._overwrite:
            raise UserError(f"the bundle {self.path} exists; pass --overwrite to replace it or choose another output directory")

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.path
            reason = f"{error.strerror or error} ({place})"
            raise UserError(f"cannot write the bundle {self.path}: {reason}; mend that and build again") from error


class HashingFile:
    """A binary file being written, with the size and SHA-256 of what went through."""

    def __init__(self, raw: BinaryIO | Any) -> None:
        self._raw = raw
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            start += self._raw.write(view[start : start + _BLOCK])
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def _hash_and_sync(place: Path) -> FileEntry:
    size = 0
    digest = hashlib.sha256()
    with open(place, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def _sync_directory(folder: Path) -> None:
    if sys.platform == "win32":
        return  # directories cannot be opened there; the rename itself is journaled
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, path: Path) -> None:
    """Put `partial` at `path` so that at no moment something half-written is there; what was there is removed."""
    if not path.exists() or not any(path.iterdir()):
        os.rename(partial, path)
        return
    if _exchange(partial, path):
        shutil.rmtree(partial, ignore_errors=True)
        return
    # Two renames: for an instant nothing is at `path`. A process killed then leaves the old bundle at `.old-<pid>`, and the next writer
    # puts it back.
    old = path.with_name(f"{path.name}.old-{os.getpid()}")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step where the system can (Linux's renameat2); False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):  # the file system or the kernel does not know the flag
        return False
    raise OSError(code, os.strerror(code), str(other))


def _lock(folder: Path) -> int:
    """Hold a lock on `folder` until the descriptor is closed or the process ends, however it ends."""
    if sys.platform == "win32":
        return os.open(os.devnull, os.O_RDONLY)  # directories cannot be locked there
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clean_up_after_the_dead(path: Path) -> None:
    """Remove what killed writers of `path` left beside it, and put an old bundle back that one had set aside."""
    pattern = re.compile(re.escape(path.name) + r"\.(partial|old)-([0-9]{1,9})")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not entry.is_dir() or not _abandoned(entry, int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            os.rename(entry, path)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _abandoned(folder: Path, process: int) -> bool:
    # Both must hold: no such process here, and no lock. The lock speaks for writers on other hosts and in other containers.
    if sys.platform == "win32":
        return False  # neither can be asked there, and what is left behind is only in the way
    if process != os.getpid():
        try:
            os.kill(process, 0)
            return False
        except ProcessLookupError:
            pass
        except OSError:
            return False
    try:
        os.close(_lock(folder))
    except OSError:
        return False
    return True

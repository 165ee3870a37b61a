"""A folder of results worth keeping between processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from pathlib import Path

from sanawm.errors import InputError

_MAGIC = b"sanawm cache 1\n"
_SUFFIX = ".entry"
_log = logging.getLogger("sanawm.cache")


class Cache:
    """Bytes by key in a folder that several processes share.

    Entries are written under a temporary name and renamed, and carry a checksum: a damaged, cut or foreign file is a missing entry, which
    is removed and made again. Nothing is locked, because the same key always stands for the same bytes. A folder that cannot be written is
    no reason to stop: `put` says so in the log. The checksum is no protection from someone who may write to the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 2**30) -> None:
        """Raises InputError if the folder cannot be made."""
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot use the cache folder {self.folder}: {error.strerror or error}; choose another with --cache") from error

    def get(self, key: str, size: int) -> bytes | None:
        """The `size` bytes kept under `key`, or None."""
        place = self._place(key)
        try:
            with open(place, "rb") as file:
                head = file.read(len(_MAGIC) + 32)
                # Reading stops at what the caller expects, whatever the file holds.
                data = file.read(size + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("cache_unreadable", extra={"entry": place.name, "reason": error.strerror or str(error)})
            return None
        if head != _MAGIC + _digest(key, data) or len(data) != size:
            _log.warning("cache_damaged", extra={"entry": place.name})
            with contextlib.suppress(OSError):
                place.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(place)  # what was used last goes last
        return data

    def put(self, key: str, data: bytes) -> bool:
        """Keep `data` under `key`; False, and a line in the log, where that was not possible."""
        place = self._place(key)
        temporary = self.folder / f".{place.stem[:16]}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(_MAGIC + _digest(key, data) + data)
            os.replace(temporary, place)
            self._evict()
        except OSError as error:
            _log.warning("cache_not_written", extra={"entry": place.name, "reason": error.strerror or str(error)})
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return False
        return True

    def _place(self, key: str) -> Path:
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)

    def _evict(self) -> None:
        found = []
        for entry in os.scandir(self.folder):
            # Another process may have removed it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_SUFFIX):
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(len(key).to_bytes(8, "little") + key.encode() + data).digest()

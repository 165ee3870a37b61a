"""What the library compiled for one GPU, kept between runs.

An engine for RTX GPUs is finished on the GPU it runs on, which takes long the first time. The result is kept in a folder beside the bundle, one
for every GPU model and driver, one file for every program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger("sanawm.tensorrt")
_FORMAT = 1
_MOST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class JitKey:
    """What compiled code depends on: the GPU model, the driver ("13.1"), the library ("TensorRT-RTX 1.7.1.116")."""

    gpu: str
    driver: str
    library: str

    @property
    def folder(self) -> str:
        """For example "NVIDIA-GeForce-RTX-5090-13.1"."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.gpu}-{self.driver}").strip("-")


class JitFiles:
    """Compiled code of a bundle's programs; a file that does not fit, or that others may have written, is left alone and counts as absent."""

    def __init__(self, bundle: Path, key: JitKey, root: Path | None = None) -> None:
        self._key = key
        self.folder = (root or bundle.with_name(f"{bundle.name}.jit")) / key.folder

    def read(self, program: str, engine_sha256: str) -> bytes | None:
        """What was kept for a program whose engine file has that hash, or None."""
        path = self.folder / program
        try:
            with open(path, "rb", opener=_without_links) as file:
                if not _ours(os.fstat(file.fileno())):
                    _LOG.warning("%s may have been written by others and is not used; remove it", path)
                    return None
                head, data = json.loads(file.readline(4096)), file.read(_MOST_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _LOG.warning("%s cannot be read (%s); it is compiled again", path, error)
            return None
        wanted = self._head(engine_sha256, data)
        if head == wanted:
            return data
        stale = [name for name in wanted if not isinstance(head, dict) or head.get(name) != wanted[name]]
        _LOG.info("%s does not fit (%s); it is compiled again", path, ", ".join(stale))
        return None

    def write(self, program: str, engine_sha256: str, data: bytes) -> bool:
        """Keep the code of a program; False where the folder cannot be written, which costs time at the next start and nothing else."""
        path = self.folder / program
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(json.dumps(self._head(engine_sha256, data)).encode() + b"\n" + data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            _LOG.warning("%s cannot be written (%s); programs are compiled again at the next start", path, error.strerror or error)
            return False
        return True

    def _head(self, engine_sha256: str, data: bytes) -> dict[str, object]:
        key = self._key
        facts = {"format": _FORMAT, "gpu": key.gpu, "driver": key.driver, "library": key.library, "engine": engine_sha256}
        return facts | {"sha256": hashlib.sha256(data).hexdigest()}


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _ours(found: os.stat_result) -> bool:
    """Whether nobody but this user (or root) can have written a file: it holds code for the GPU."""
    if not hasattr(os, "getuid"):
        return True
    return found.st_uid in (0, os.getuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

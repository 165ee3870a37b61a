"""File names inside a bundle: portable, relative, and never through a link."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from sanawm.errors import BundleError

# Names that every file system, archive and URL carries unchanged. This leaves no room for "..", hidden files, drives and streams ("a:b"),
# control characters, or two spellings of one Unicode name.
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", re.ASCII)
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.ASCII | re.IGNORECASE)
_MAX_COMPONENT = 128
_MAX_PATH = 512


def check_path(path: str, where: str) -> None:
    """Refuse a path that could leave the bundle or that some system cannot store.

    Accepted: relative POSIX paths of letters, digits, `_ . + -`, at most 512 characters. `where` names the field in the message. Raises
    BundleError.
    """
    parts = path.split("/")
    if not path:
        reason = "is empty"
    elif len(path) > _MAX_PATH or max(map(len, parts)) > _MAX_COMPONENT:
        reason = "is too long"
    elif path.startswith("/") or re.match(r"[A-Za-z]:", path):
        reason = "is absolute"
    elif ".." in parts:
        reason = "leads out of the bundle ('..')"
    elif "\\" in path:
        reason = "uses a backslash"
    elif any(not _COMPONENT.fullmatch(part) for part in parts):
        reason = "holds an empty part or a character other than letters, digits, '_', '.', '+' and '-'"
    elif any(_WINDOWS_DEVICE.fullmatch(part) or part.endswith(".") for part in parts):
        reason = "is not a file name on Windows"
    else:
        return
    raise BundleError(f"{where}: the path {path[:80]!r} {reason}; such a bundle is not opened, get it again from a source you trust")


def check_collisions(paths: Iterable[str], where: str) -> None:
    """Refuse names that are one file where case is ignored, and a file that is also a folder. Raises BundleError."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        lower = path.lower()
        if lower in files:
            raise BundleError(f"{where}: {files[lower]!r} and {path!r} differ only in case; rename one and rebuild the bundle")
        files[lower] = path
        while "/" in lower:
            lower = lower.rpartition("/")[0]
            folders.setdefault(lower, path)
    for folder, path in folders.items():
        if folder in files:
            raise BundleError(f"{where}: {files[folder]!r} is both a file and the folder of {path!r}; rename one and rebuild the bundle")


def open_inside(root: Path, path: str) -> int:
    """Open one regular file of a bundle for reading and return its descriptor, which the caller closes.

    Each component is opened relative to the one before without following links, so that no exchange of a folder for a link between
    check and use leads outside. `path` has passed `check_path`. Raises BundleError for a missing file, a link, or anything but a regular
    file.
    """
    parts = path.split("/")
    if os.open not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
        return _open_checked(root, parts)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"bundle {root}: cannot be opened ({error.strerror}); mend its permissions") from None
    try:
        for part in parts[:-1]:
            deeper = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = deeper
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise _explain(root, parts, error) from None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"bundle {root}: {path} is not a regular file; copy or rebuild the bundle")
    return descriptor


def _open_checked(root: Path, parts: list[str]) -> int:
    # Systems without openat: look at each component first. Someone who can write into the bundle while it is opened can race this; the hash
    # of what is read still has to match.
    place = root
    for part in parts:
        place = place / part
        try:
            mode = os.lstat(place).st_mode
        except OSError as error:
            raise _explain(root, parts, error) from None
        expected = stat.S_ISREG(mode) if place == root.joinpath(*parts) else stat.S_ISDIR(mode)
        if not expected:
            raise _explain(root, parts, OSError(errno.ELOOP, "not a plain file or folder"))
    return os.open(place, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _explain(root: Path, parts: list[str], error: OSError) -> BundleError:
    path = "/".join(parts)
    for depth in range(1, len(parts) + 1):
        if root.joinpath(*parts[:depth]).is_symlink():
            link = "/".join(parts[:depth])
            return BundleError(f"bundle {root}: {link} is a symbolic link, and a bundle holds plain files only; copy it with `cp -rL`")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BundleError(f"bundle {root}: the manifest names {path}, which is missing; copy the whole bundle again or rebuild it")
    return BundleError(f"bundle {root}: cannot open {path} ({error.strerror}); mend its permissions or copy the bundle again")

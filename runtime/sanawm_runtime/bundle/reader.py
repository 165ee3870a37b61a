"""Opening and verifying a bundle."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sanawm.errors import BundleError
from sanawm_runtime.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, FileEntry, Manifest, TargetEntry, parse_manifest
from sanawm_runtime.bundle.paths import open_inside

State = Literal["ok", "changed", "missing", "extra"]
# path, bytes hashed so far over all files, bytes in all
Progress = Callable[[str, int, int], None]

_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class FileStatus:
    """What verification found about one file; `detail` says more where the state is not "ok"."""

    path: str
    state: State
    detail: str = ""


@dataclass(frozen=True)
class BundleReport:
    """The outcome of a full verification, one status per file, sorted by path."""

    files: tuple[FileStatus, ...]

    @property
    def ok(self) -> bool:
        """True if every file of the manifest is present and unchanged; extra files are never loaded and do not count."""
        return all(status.state in ("ok", "extra") for status in self.files)

    def by_state(self, state: State) -> tuple[FileStatus, ...]:
        return tuple(status for status in self.files if status.state == state)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its place, its manifest, and the SHA-256 of the manifest's bytes (which stands for the whole content)."""

    root: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: Literal["sizes", "full", "manifest"] = "sizes",
        manifest_check: Callable[[Path, bytes], None] | None = None,
        target_check: Callable[[TargetEntry], None] | None = None,
        progress: Progress | None = None,
    ) -> Bundle:
        """Open the bundle at `path`, cheap failures first: present, schema, target, sizes, then hashes if `verify` is "full".

        "manifest" looks at no file, for a caller that wants `verify`'s report of a damaged bundle. `manifest_check` gets the root and the
        manifest's bytes before anything else looks at them and raises BundleError to refuse them (see `sign.signature_check`).
        `target_check` gets the manifest's target and raises BundleError if this machine cannot run it (see `targets.check_target`). With
        "sizes" nothing is trusted unseen either: `read` and `open_verified` hash what they hand out. Raises BundleError.
        """
        root = Path(path)
        if not os.path.exists(root):
            raise BundleError(f"bundle {root}: no such directory; give the directory that `sanawm build-engine -o` wrote")
        if not os.path.isdir(root):
            raise BundleError(f"bundle {root}: is a file, and a bundle is a directory with a {MANIFEST_NAME}; give the directory")
        data = _read_manifest(root)
        if manifest_check is not None:
            manifest_check(root, data)
        manifest = parse_manifest(data, str(root / MANIFEST_NAME))
        if target_check is not None:
            target_check(manifest.target)
        bundle = cls(root=root, manifest=manifest, digest=hashlib.sha256(data).hexdigest())
        for name, entry in manifest.files.items() if verify != "manifest" else ():
            os.close(bundle._open(name, entry))
        if verify == "full":
            report = bundle.verify(progress)
            if bad := [status for status in report.files if status.state in ("changed", "missing")]:
                more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
                raise BundleError(f"bundle {root}: {bad[0].path} {bad[0].detail}{more}; copy the bundle again or rebuild it")
        return bundle

    def read(self, name: str) -> bytes:
        """The content of file `name`, returned only after these very bytes matched the manifest's hash. Raises BundleError."""
        entry = self._entry(name)
        with os.fdopen(self._open(name, entry), "rb") as file:
            try:
                data = file.read(entry.size)
                whole = len(data) == entry.size and not file.read(1)
            except OSError as error:
                raise self._changed(name, f"cannot be read ({error.strerror})") from None
        if not whole:
            raise self._changed(name, "changed while it was read")
        self._check_hash(name, entry, memoryview(data))
        return data

    def open_verified(self, name: str) -> memoryview:
        """A read-only map of file `name`, handed out after the mapped bytes matched the manifest's hash. Raises BundleError.

        Costs no memory of its own, which is what large weight files need. The map is private and its descriptor was opened without
        following links, so replacing or renaming the file changes nothing; but its pages are those of the page cache, so someone who may
        write to the file in place can still change (or, by truncating, take away) what was hashed. Use it for weights, where a wrong byte
        is a wrong picture; take code and engines, where a wrong byte can run, from `read`.
        """
        entry = self._entry(name)
        descriptor = self._open(name, entry)
        try:
            if entry.size == 0:
                view = memoryview(b"")
            elif hasattr(mmap, "MAP_PRIVATE"):
                view = memoryview(mmap.mmap(descriptor, entry.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
            else:
                view = memoryview(mmap.mmap(descriptor, entry.size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise BundleError(f"bundle {self.root}: cannot map {name} ({error}); copy the bundle to a local disk") from None
        finally:
            os.close(descriptor)
        self._check_hash(name, entry, view)
        return view

    def verify(self, progress: Progress | None = None) -> BundleReport:
        """Hash every file and look for files that the manifest does not name. Never raises for what it finds; the report says it."""
        total = self.manifest.total_bytes()
        done = 0
        found: list[FileStatus] = []
        for name, entry in self.manifest.files.items():

            def advance(count: int, name: str = name, start: int = done) -> None:
                if progress is not None:
                    progress(name, start + count, total)

            found.append(self._status(name, entry, advance))
            done += entry.size
        found += (FileStatus(path, "extra", "is not named by the manifest and is never loaded") for path in self._extras())
        return BundleReport(tuple(sorted(found, key=lambda status: status.path)))

    def _status(self, name: str, entry: FileEntry, advance: Callable[[int], None]) -> FileStatus:
        if not os.path.lexists(self.root / name):
            return FileStatus(name, "missing", "is missing")
        digest = hashlib.sha256()
        count = 0
        try:
            with os.fdopen(self._open(name, entry), "rb", buffering=0) as file:
                # Reading stops one block after the promised size, should the file grow meanwhile.
                while count <= entry.size and (block := file.read(_BLOCK)):
                    digest.update(block)
                    count += len(block)
                    advance(min(count, entry.size))
        except BundleError as error:
            return FileStatus(name, "changed", str(error).removeprefix(f"bundle {self.root}: {name} ").partition("; ")[0])
        except OSError as error:
            return FileStatus(name, "changed", f"cannot be read ({error.strerror})")
        if digest.hexdigest() != entry.sha256:
            return FileStatus(name, "changed", f"has SHA-256 {digest.hexdigest()[:12]}…, and the manifest says {entry.sha256[:12]}…")
        return FileStatus(name, "ok")

    def _extras(self) -> list[str]:
        extras = []
        for folder, subfolders, names in os.walk(self.root):
            # os.walk lists links to folders among the folders and does not enter them; they are extra like any other entry.
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in names + links:
                path = Path(folder, name).relative_to(self.root).as_posix()
                if path not in (MANIFEST_NAME, SIGNATURE_NAME) and path not in self.manifest.files:
                    extras.append(path)
        return extras

    def _entry(self, name: str) -> FileEntry:
        try:
            return self.manifest.files[name]
        except KeyError:
            raise BundleError(f"bundle {self.root}: the manifest does not name {name[:80]!r}, so it is not loaded; rebuild it") from None

    def _open(self, name: str, entry: FileEntry) -> int:
        descriptor = open_inside(self.root, name)
        size = os.fstat(descriptor).st_size
        if size != entry.size:
            os.close(descriptor)
            raise self._changed(name, f"has {size:,} bytes, and the manifest says {entry.size:,}")
        return descriptor

    def _check_hash(self, name: str, entry: FileEntry, view: memoryview) -> None:
        digest = hashlib.sha256()
        for start in range(0, len(view), _BLOCK):
            digest.update(view[start : start + _BLOCK])
        if digest.hexdigest() != entry.sha256:
            raise self._changed(name, f"has SHA-256 {digest.hexdigest()[:12]}…, and the manifest says {entry.sha256[:12]}…")

    def _changed(self, name: str, what: str) -> BundleError:
        return BundleError(f"bundle {self.root}: {name} {what}; copy the bundle again or rebuild it")


def _read_manifest(root: Path) -> bytes:
    if not os.path.lexists(root / MANIFEST_NAME):
        raise BundleError(f"bundle {root}: no {MANIFEST_NAME} in it; give the directory that `sanawm build-engine -o` wrote")
    descriptor = open_inside(root, MANIFEST_NAME)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)

"""Finished engines by what they were built from, so that nothing is built twice.

Two keys lead to an engine. The content key covers the lowered graph with its kernels, the weights it uses, target, library and options. The
request key is known before anything is exported: checkpoint, configuration, precision, program, and the versions and sources that turn them
into a graph. It makes a repeated build instant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sanawm.errors import UserError
from sanawm_export.provenance import file_digest
from sanawm_export.tensorrt.job import Built

# Part of every key: raise it when an engine means something else under the same inputs.
FORMAT = 1
_BLOCK = 8 * 2**20
ENGINE_FILE, REPORT_FILE = "engine", "report.json"


def default_directory() -> Path:
    """Where engines are kept between builds, by default; can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanawm" / "engines"


@dataclass(frozen=True)
class Cached:
    """An engine in the cache: its file, its report, and facts that the bundle repeats."""

    file: Path
    built: Built
    extras: dict[str, Any]


class EngineCache:
    """Engines under `root`. Entries appear whole or not at all; a damaged one is removed and counts as absent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: str | None = None

    def find(self, key: str) -> Cached | None:
        """The engine with this content key, its bytes checked against the hash of its report."""
        folder = self._folder("engines", key)
        try:
            text = json.loads((folder / REPORT_FILE).read_text())
            built = Built.from_json(json.dumps(text["built"]))
            if file_digest(folder / ENGINE_FILE) == built.sha256:
                return Cached(folder / ENGINE_FILE, built, text["extras"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent, or damaged and built again
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def add(self, key: str, engine: Path, built: Built, extras: Mapping[str, Any]) -> Cached:
        """Take the file `engine` into the cache under a content key. Raises UserError when it cannot be stored."""
        folder = self._folder("engines", key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
            shutil.move(engine, work / ENGINE_FILE)
            (work / REPORT_FILE).write_text(json.dumps({"built": json.loads(built.to_json()), "extras": dict(extras)}))
            # Another build may have finished the same engine meanwhile; either is good.
            with contextlib.suppress(OSError):
                os.rename(work, folder)
            shutil.rmtree(work, ignore_errors=True)
            return Cached(folder / ENGINE_FILE, built, dict(extras))
        except OSError as error:
            raise UserError(f"cannot write the engine cache {self.root} ({error.strerror or error}); free space or give another place") from error

    def timing_file(self, *facts: str) -> Path:
        """Where a library keeps kernel timings of one version and target."""
        return self.root / "timing" / "-".join(facts)

    def remember(self, request: str, key: str) -> None:
        """Note which content key a request led to."""
        place = self._folder("requests", request)
        with contextlib.suppress(OSError):  # the note saves time and nothing depends on it
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=place.parent)
            with os.fdopen(handle, "w") as file:
                file.write(key)
            os.replace(temporary, place)

    def recall(self, request: str) -> Cached | None:
        """The engine that a request led to, if it still is in the cache."""
        try:
            key = self._folder("requests", request).read_text()
        except OSError:
            return None
        return self.find(key) if len(key) == 64 and key.isalnum() else None

    def _folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key


def digest(facts: Any) -> str:
    """SHA-256 of JSON facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class WeightDigests:
    """SHA-256 of stored weights, each hashed once however many graphs use it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], str] = {}

    def of(self, model: ir.Model) -> dict[str, str]:
        """Digest of every weight that the graph keeps in a file, by its name in the graph."""
        return {name: self._one(tensor) for name, tensor in external_tensors(model)}

    def _one(self, tensor: ir.ExternalTensor) -> str:
        path, start, size = str(tensor.path), tensor.offset or 0, tensor.length or tensor.nbytes
        key = (path, start, size)
        if key not in self._known:
            total = hashlib.sha256()
            with open(path, "rb") as file:
                file.seek(start)
                for left in range(size, 0, -_BLOCK):
                    total.update(file.read(min(left, _BLOCK)))
            self._known[key] = total.hexdigest()
        return self._known[key]


def external_tensors(model: ir.Model) -> Iterable[tuple[str, ir.ExternalTensor]]:
    """Initializers that lie in a file beside the graph."""
    return ((n, v.const_value) for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor))


def graph_digest(model: ir.Model, weights: Mapping[str, str]) -> str:
    """SHA-256 of a graph's structure and the content of its weights; where the weights lie does not matter."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            del tensor.external_data[:]
            tensor.doc_string = weights[tensor.name]
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def sources_digest(packages: Iterable[str] = ("sanawm", "sanawm_kernels", "sanawm_calibration", "sanawm_export", "sanawm_runtime")) -> str:
    """SHA-256 of the Python and table files that decide what an exported graph and its kernels are."""
    import importlib.util

    total = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        for root in sorted(spec.submodule_search_locations or []) if spec else []:
            for path in sorted(p for p in Path(root).rglob("*") if p.suffix in (".py", ".toml", ".json", ".csv")):
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()

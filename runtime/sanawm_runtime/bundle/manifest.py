"""The manifest: what a bundle is, what it is for, and every file it consists of."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from sanawm.config import WorldConfig
from sanawm.errors import BundleError
from sanawm_runtime.bundle.paths import check_collisions, check_path
from sanawm_runtime.bundle.strict_json import decode, parse_json

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "signature.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20

Engine = Literal["onnxruntime", "tensorrt_rtx", "tensorrt", "cuda"]
Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float4_e2m1", "int64", "int32", "int8", "uint8", "bool"]

_MOST, _MOST_LAYERS = 2**20, 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CAPABILITY = re.compile(r"sm_[0-9]{2,3}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", re.ASCII)
_CREATED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)


@dataclass(frozen=True)
class TensorEntry:
    """An input or output of a program. `shape` is fully static."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ProgramEntry:
    """One compiled function: its main file, its signature, and what its engine needs besides."""

    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lowercase hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TargetEntry:
    """What the programs were compiled for. `capability` ("sm_120") and `platform` ("linux-x86_64") are None where any will do."""

    name: str
    engine: Engine
    capability: str | None = None
    platform: str | None = None


@dataclass(frozen=True)
class PrecisionEntry:
    """The precision recipe by name, and what the build made of it."""

    recipe: str
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointEntry:
    """Where the weights came from."""

    source: str
    kind: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says.

    `created` is UTC, `2026-11-23T06:00:00Z`. `files` is keyed by relative POSIX path and does not list the manifest itself. `unverified`
    holds sentences about what nobody has run on the target's hardware.
    """

    name: str
    created: str
    config: WorldConfig
    target: TargetEntry
    precision: PrecisionEntry
    programs: dict[str, ProgramEntry]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    checkpoint: CheckpointEntry
    calibration: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    unverified: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """The manifest as UTF-8 JSON, the same bytes for the same content. Raises BundleError for content that the reader would refuse."""
        fields = {"schema_version": self.schema_version, **dataclasses.asdict(self)}
        fields["programs"] = dict(sorted(fields["programs"].items()))
        fields["files"] = dict(sorted(fields["files"].items()))
        try:
            data = (json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        except (TypeError, ValueError) as error:
            raise BundleError(f"{MANIFEST_NAME}: content that JSON cannot hold ({error}); correct what builds the manifest") from None
        parse_manifest(data)
        return data

    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def utc_now() -> str:
    """The present time as a manifest writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_manifest(data: bytes, what: str = MANIFEST_NAME) -> Manifest:
    """Read a manifest from untrusted bytes. Raises BundleError, and nothing else, with the JSON path of what is wrong."""
    document = parse_json(data, what, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(document, dict) or type(document.get("schema_version")) is not int:
        raise BundleError(f"{what}: expected an object with an integer schema_version; this is not a sanawm bundle")
    version = document["schema_version"]
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{what}: made by a newer version (schema {version}, this runtime reads up to {SCHEMA_VERSION}): upgrade sanawm or rebuild"
        )
    if version < 1:
        raise BundleError(f"{what}: schema {version} does not exist; this is not a sanawm bundle")
    manifest: Manifest = decode(Manifest, document, what)
    _check(manifest, what)
    return manifest


def _check(manifest: Manifest, what: str) -> None:
    try:
        if not _CREATED.fullmatch(manifest.created):
            raise ValueError
        datetime.datetime.strptime(manifest.created, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        raise BundleError(
            f"{what}.created: expected a UTC time like 2026-11-23T06:00:00Z, found {manifest.created[:40]!r}; rebuild the bundle"
        ) from None
    _check_target(manifest.target, f"{what}.target")
    _check_sizes(manifest.config, f"{what}.config")
    if manifest.checkpoint.sha256 is not None:
        _check_hash(manifest.checkpoint.sha256, f"{what}.checkpoint.sha256")
    for path, entry in manifest.files.items():
        check_path(path, f"{what}.files")
        if path.lower() in (MANIFEST_NAME, SIGNATURE_NAME):
            own = "the manifest itself" if path.lower() == MANIFEST_NAME else "its signature"
            raise BundleError(f"{what}.files: lists {own}; rebuild the bundle")
        if entry.size < 0:
            raise BundleError(f"{what}.files.{path}.size: expected a size in bytes, found {entry.size}; rebuild the bundle")
        _check_hash(entry.sha256, f"{what}.files.{path}.sha256")
    check_collisions(manifest.files, f"{what}.files")
    for name, program in manifest.programs.items():
        where = f"{what}.programs.{name[:80]}"
        if not _NAME.fullmatch(name):
            raise BundleError(f"{where}: a program's name is letters, digits, '_', '.', '+' and '-'; rebuild the bundle")
        if program.file not in manifest.files:
            raise BundleError(f"{where}.file: {program.file[:80]!r} is not among the manifest's files; rebuild the bundle")
        _check_tensors(program.inputs, f"{where}.inputs")
        _check_tensors(program.outputs, f"{where}.outputs")


def _check_sizes(config: Any, where: str) -> None:
    # Far beyond any model, and small enough that a table of programs made from a hostile manifest stays a table.
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            _check_sizes(value, name)
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and not 0 <= number <= (_MOST_LAYERS if "layers" in field.name or field.name == "depth" else _MOST):
                raise BundleError(f"{name}: {number:,} is not a size that a model has; rebuild the bundle")
        if isinstance(value, tuple) and len(value) > _MOST_LAYERS:
            raise BundleError(f"{name}: {len(value):,} entries are more than a model has; rebuild the bundle")


def _check_target(target: TargetEntry, where: str) -> None:
    if target.capability is not None and not _CAPABILITY.fullmatch(target.capability):
        raise BundleError(f"{where}.capability: expected one like 'sm_120', found {target.capability[:40]!r}; rebuild the bundle")
    if target.engine != "onnxruntime" and target.capability is None:
        raise BundleError(f"{where}.capability: the {target.engine} engine is built for one, and none is given; rebuild the bundle")


def _check_hash(text: str, where: str) -> None:
    if not _SHA256.fullmatch(text):
        raise BundleError(f"{where}: expected 64 lowercase hexadecimal digits, found {text[:72]!r}; rebuild the bundle")


def _check_tensors(tensors: tuple[TensorEntry, ...], where: str) -> None:
    seen: set[str] = set()
    for index, tensor in enumerate(tensors):
        if not tensor.name or tensor.name in seen:
            raise BundleError(f"{where}[{index}].name: {tensor.name[:40]!r} is empty or repeated; rebuild the bundle")
        if any(size < 0 for size in tensor.shape):
            raise BundleError(f"{where}[{index}].shape: sizes must not be negative, found {list(tensor.shape)}; rebuild the bundle")
        seen.add(tensor.name)

"""The bundle: a directory of compiled programs that a manifest names, sizes and hashes."""

from sanawm_runtime.bundle.manifest import (
    MANIFEST_NAME,
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
from sanawm_runtime.bundle.reader import Bundle, BundleReport, FileStatus

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleReport",
    "CheckpointEntry",
    "FileEntry",
    "FileStatus",
    "Manifest",
    "PrecisionEntry",
    "ProgramEntry",
    "TargetEntry",
    "TensorEntry",
    "parse_manifest",
]

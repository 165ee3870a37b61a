"""Streaming writers of safetensors and torch files, which never hold more than a piece of one tensor."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from sanawm.config import Dtype
from sanawm.model.checkpoint.lazy import require

# A piece of a tensor as stored, little-endian.
Piece = bytes | memoryview
Fill = Callable[["Entry"], Iterator[Piece]]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
_SAFETENSORS_NAMES: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16"}
_TORCH_STORAGES: dict[Dtype, str] = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
_ALIGNMENT = 64  # of tensor data in a torch file, as torch itself writes it
_LOCAL_HEADER = 30  # bytes of a zip record's header before its name
_ZIP64_EXTRA = 20
_PADDING_FIELD = 0x4246  # id of the extra field that aligns a record; readers skip fields that they do not know


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `key` says which values it gets, the container under which name it is stored."""

    key: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_safetensors(path: Path, entries: Mapping[str, Entry], fill: Fill, metadata: Mapping[str, str] | None = None) -> None:
    """Write `entries` (stored name -> entry) to a new safetensors file; `fill` yields each one's bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.nbytes
        header[name] = {"dtype": _SAFETENSORS_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries.values():
            _copy(file.write, entry, fill)


def write_torch(path: Path, state: Any, fill: Fill) -> None:
    """Write nested dicts and lists of entries and plain values to a new file that `torch.load` reads, memory-mapped or not.

    The format is torch's zip archive: an uncompressed record with the pickled structure and one for each tensor's storage.
    """
    buffer = BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(state)
    stem = path.stem
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _record(archive, f"{stem}/data.pkl", buffer.getbuffer().nbytes, [buffer.getvalue()])
        _record(archive, f"{stem}/byteorder", 6, [b"little"])
        for number, entry in enumerate(pickler.entries):
            _record(archive, f"{stem}/data/{number}", entry.nbytes, fill(entry))
        _record(archive, f"{stem}/version", 2, [b"3\n"])


class _Pickler(pickle.Pickler):
    """Pickles an Entry as the torch tensor that will stand in the file."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.torch = require("torch")
        self.entries: list[Entry] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Entry):
            return NotImplemented
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        return self.torch._utils._rebuild_tensor_v2, (_Storage(value), 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        self.entries.append(value.entry)
        kind = getattr(self.torch, _TORCH_STORAGES[value.entry.dtype])
        return "storage", kind, str(len(self.entries) - 1), "cpu", math.prod(value.entry.shape)


@dataclass(frozen=True)
class _Storage:
    entry: Entry


def _record(archive: zipfile.ZipFile, name: str, size: int, pieces: Iterable[Piece]) -> None:
    info = zipfile.ZipInfo(name)
    info.file_size = size
    large = size > 1 << 30
    start = archive.start_dir + _LOCAL_HEADER + len(name.encode()) + (_ZIP64_EXTRA if large else 0)
    padding = -(start + 4) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)


def _copy(write: Callable[[Piece], Any], entry: Entry, fill: Fill) -> None:
    written = 0
    for piece in fill(entry):
        write(piece)
        written += memoryview(piece).nbytes
    if written != entry.nbytes:
        raise AssertionError(f"{entry.key}: wrote {written} bytes of {entry.nbytes}")

"""Readers of number arrays in user files."""

from __future__ import annotations

import json
import os
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import CameraError

# 100,000 poses are 13 MB as .npy and about 40 MB as indented JSON; anything much larger is another kind of file.
MAX_FILE_BYTES = 256 * 2**20

SUFFIXES = (".npy", ".json", ".txt")

# What numpy's reader raises on damaged headers; a damaged header can be any Python text, so the tokenizer takes part.
_NPY_ERRORS = (ValueError, EOFError, SyntaxError, tokenize.TokenError, TypeError, OverflowError, MemoryError, FloatingPointError)


def read_array(path: str | os.PathLike[str]) -> NDArray[np.float64]:
    """Read the array of a .npy, .json (nested list) or .txt (one row a line) file.

    Returns float64 with the file's shape; a .txt file gives two dimensions. Never unpickles. Raises CameraError when the file is missing,
    of another kind, too large, damaged, or holds anything but real numbers.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise CameraError(f"{file}: expected a .npy, .json or .txt file, found '{file.suffix or 'no suffix'}'; convert or rename it")
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CameraError(f"{file}: {size:,} bytes is more than the {MAX_FILE_BYTES:,} a camera file may have; check that it is one")
        array = {".npy": _read_npy, ".json": _read_json, ".txt": _read_txt}[suffix](file)
    except OSError as error:
        raise CameraError(f"{file}: cannot be read ({error.strerror or error}); check the path and its permissions") from error
    if array.dtype.kind not in "fiu":
        raise CameraError(f"{file}: expected real numbers, found values of type {array.dtype}; write it as a float array")
    return array.astype(np.float64)


def _read_npy(file: Path) -> NDArray[Any]:
    try:
        # Mapping compares the header's shape with the file's size, so a header that promises terabytes costs nothing.
        with np.errstate(over="raise"):
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except _NPY_ERRORS as error:
        raise CameraError(f"{file}: not a plain .npy array ({error}); write it with numpy.save and a float dtype") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CameraError(f"{file}: expected one .npy array, found an archive of several; write the array alone with numpy.save")
    return np.array(array)


def _read_json(file: Path) -> NDArray[Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CameraError(f"{file}: lists nested too deeply; expected a list of matrices") from error
    except ValueError as error:
        raise CameraError(f"{file}: not valid JSON ({error}); write the array with json.dump(array.tolist(), file)") from error
    if not isinstance(data, list):
        raise CameraError(f"{file}: expected a nested list of numbers, found a JSON {type(data).__name__}; write the array alone")
    try:
        return np.array(data)
    except (ValueError, OverflowError) as error:
        raise CameraError(f"{file}: the nested lists have different lengths; every frame needs a matrix of the same shape") from error


def _read_txt(file: Path) -> NDArray[Any]:
    rows: list[list[float]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CameraError(f"{file}: not a text file ({error.reason} at byte {error.start}); expected one row of numbers a line") from error
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise CameraError(f"{file}, line {number}: expected numbers, found {line.strip()[:40]!r}; keep one row a line") from error
        if rows and len(row) != len(rows[0]):
            raise CameraError(f"{file}, line {number}: expected {len(rows[0])} numbers as in row 1, found {len(row)}; correct that line")
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 0)

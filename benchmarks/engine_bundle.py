"""Bundles of the full size with random weights, made where they are measured.

    python benchmarks/engine_bundle.py FOLDER --precision bf16 --precision fp8

FOLDER/<precision>-seed makes its weights when it is opened, FOLDER/<precision> has them in files, as a bundle of a real checkpoint does. Parts that
are alike in several precisions are written once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sanawm.config import WorldConfig, preset
from sanawm_export.build import BuildRequest
from sanawm_export.bundle_writer import BundleWriter
from sanawm_export.cuda.build import build_cuda_synthetic
from sanawm_export.cuda.synthetic import SyntheticCheckpoint
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.engines._cuda_pack import Packed
from sanawm_runtime.engines._cuda_weights import contents, read_table
from sanawm_runtime.targets import resolve_target

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}


def build(path: Path, world: WorldConfig, target: str, precision: str, seed: int, latent_frames: int = 121) -> Bundle:
    """A bundle without weights."""
    checkpoint = SyntheticCheckpoint(world, seed)
    request = BuildRequest(checkpoint, resolve_target(target), "cuda", precision, latent_frames)  # type: ignore[arg-type]
    return build_cuda_synthetic(request, path, seed, overwrite=True)


def stored(source: Bundle, path: Path, written: dict[bytes, Path]) -> Bundle:
    """The same bundle with its weights in files. `written`: weight files by their table, which grows by those that this writes.

    Parts are written beside one another: each waits for its largest tensor, which one core makes.
    """
    tables = {name: source.read(name) for name in source.manifest.files if name.startswith("weights/")}
    with BundleWriter(path, overwrite=True) as writer:

        def add(name: str, data: bytes) -> None:
            table, file = read_table(data, name), _weights_file(name)
            if data in written:
                writer.add_file(file, written[data], "link")
            else:
                with writer.create(file) as out:
                    write(out.write, table.tensors, contents(table, source))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for done in [pool.submit(add, *item) for item in tables.items()]:
                done.result()
        for name, data in tables.items():
            written[data] = path / _weights_file(name)
            document = {"tensors": [dataclasses.asdict(t) for t in read_table(data, name).tensors], "file": _weights_file(name)}
            writer.add_bytes(name, json.dumps(document, separators=(",", ":")).encode())
        for name in source.manifest.files:
            if name not in tables:
                writer.add_bytes(name, source.read(name))
        return writer.finish(dataclasses.replace(source.manifest, files={}))


def _weights_file(table: str) -> str:
    return f"{table.removesuffix('.json')}.safetensors"


def write(put: Callable[[bytes | memoryview], object], tensors: tuple[Packed, ...], values: Iterable[tuple[Packed, NDArray[np.uint8]]]) -> None:
    """A safetensors file."""
    header, offset = {}, 0
    for packed in tensors:
        header[packed.name] = {"dtype": SAFETENSORS[packed.dtype], "shape": list(packed.shape), "data_offsets": [offset, offset + packed.nbytes]}
        offset += packed.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    put(struct.pack("<Q", len(text)) + text)
    for _, data in values:
        put(data.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", action="append", default=[])
    parser.add_argument("--config", default="full")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-weights", action="store_true", help="only the bundles that make their weights when they are opened")
    options = parser.parse_args()
    written: dict[bytes, Path] = {}
    for precision in options.precision or ["bf16"]:
        begin = time.perf_counter()
        made = build(options.folder / f"{precision}-seed", preset(options.config), options.target, precision, options.seed)
        print(f"{made.root}: {time.perf_counter() - begin:.1f} s on {os.cpu_count()} cores", flush=True)
        if not options.no_weights:
            begin = time.perf_counter()
            whole = stored(made, options.folder / precision, written)
            print(f"{whole.root}: {whole.manifest.total_bytes() / 1e9:.2f} GB in {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()

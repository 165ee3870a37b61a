"""Packed weights on the way to the device: from a bundle's file, or made from a seed."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import BundleError
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.bundle.strict_json import decode, parse_json
from sanawm_runtime.engines._cuda_device import Event, Gpu
from sanawm_runtime.engines._cuda_pack import Packed
from sanawm_runtime.engines._cuda_plan import ALIGNMENT

MAX_TABLE_BYTES = 64 * 2**20
# Pinned memory that a piece of a weight passes through; two of them, so that filling one overlaps sending the other.
STAGE_BYTES = 32 * 2**20
# Threads that make weights from a seed, and the packed bytes that they may be ahead; in float32 these are four times as large.
MAKERS = 16
AHEAD_BYTES = 3 * 2**30


@dataclass(frozen=True)
class WeightTable:
    """A part's packed weights: what each is made of, and the file that holds them or the seed that makes them."""

    tensors: tuple[Packed, ...]
    file: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.seed is None):
            raise BundleError("packed weights come from a file or from a seed; rebuild the bundle")
        if self.file is None and any(packed.op == "calibrated" for packed in self.tensors):
            raise BundleError("calibrated weights come from a file, found a seed; rebuild the bundle")

    def offsets(self) -> tuple[dict[str, int], int]:
        """Place of each tensor in one block of device memory, and the block's size."""
        places, total = {}, 0
        for packed in self.tensors:
            places[packed.name] = total
            total += -(-packed.nbytes // ALIGNMENT) * ALIGNMENT
        return places, total


def read_table(data: bytes, what: str) -> WeightTable:
    """A table as a bundle stores it. Raises BundleError."""
    table: WeightTable = decode(WeightTable, parse_json(data, what, max_bytes=MAX_TABLE_BYTES), what)
    return table


def synthetic_reader(seed: int) -> functools._lru_cache_wrapper[NDArray[np.float32]]:
    """Reads the checkpoint tensors of a synthetic checkpoint with that seed; the last few are kept, since a tensor may be packed twice."""
    from sanawm.model.checkpoint.values import synth_tensor

    return functools.lru_cache(maxsize=8)(lambda name, shape: synth_tensor(name, shape, seed))


def contents(table: WeightTable, bundle: Bundle) -> Iterator[tuple[Packed, NDArray[np.uint8]]]:
    """Each packed tensor's bytes, in the table's order. Raises BundleError for a file that does not hold them."""
    if table.file is None:
        assert table.seed is not None
        yield from _made(table.tensors, table.seed)
        return
    view = bundle.open_verified(table.file)
    places = safetensors_places(view, table.file)
    for packed in table.tensors:
        start, end = places.get(packed.name, (0, -1))
        if end - start != packed.nbytes:
            raise BundleError(f"{table.file}: {packed.name} is missing or has another size than its table says; rebuild the bundle")
        yield packed, np.frombuffer(view[start:end], np.uint8)


def _made(tensors: tuple[Packed, ...], seed: int) -> Iterator[tuple[Packed, NDArray[np.uint8]]]:
    """Tensors made from a seed on all cores; those in a row that are made of the same sources are made together."""

    def make(group: list[Packed]) -> list[tuple[Packed, NDArray[np.uint8]]]:
        read = synthetic_reader(seed)
        return [(packed, packed.make(read).reshape(-1).view(np.uint8)) for packed in group]

    groups = [list(group) for _, group in itertools.groupby(tensors, lambda packed: packed.sources)]
    sizes = [sum(packed.nbytes for packed in group) for group in groups]
    threads = min(MAKERS, os.cpu_count() or 1)
    under_way: deque[tuple[int, concurrent.futures.Future[list[tuple[Packed, NDArray[np.uint8]]]]]] = deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for group, size in zip(groups, sizes):
                while under_way and (len(under_way) >= 2 * threads or sum(n for n, _ in under_way) + size > AHEAD_BYTES):
                    yield from under_way.popleft()[1].result()
                under_way.append((size, pool.submit(make, group)))
            while under_way:
                yield from under_way.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)


def safetensors_places(view: memoryview, what: str) -> dict[str, tuple[int, int]]:
    """First byte and byte after the last of each tensor in a safetensors file. Raises BundleError."""
    if len(view) < 8:
        raise BundleError(f"{what}: not a safetensors file; rebuild the bundle")
    size = struct.unpack("<Q", view[:8])[0]
    if size > min(len(view) - 8, MAX_TABLE_BYTES):
        raise BundleError(f"{what}: not a safetensors file; rebuild the bundle")
    header = parse_json(bytes(view[8 : 8 + size]), what, max_bytes=MAX_TABLE_BYTES)
    places = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1] <= len(view) - 8 - size):
            raise BundleError(f"{what}: tensor {name[:80]} lies outside of the file; rebuild the bundle")
        places[name] = (8 + size + span[0], 8 + size + span[1])
    return places


def upload(device: Gpu, stream: object, table: WeightTable, bundle: Bundle, what: str) -> tuple[int, Mapping[str, int]]:
    """Bring the weights of a part called `what` to the device: (address of the block, to be freed by the caller; address of each tensor)."""
    offsets, total = table.offsets()
    block = device.allocate(total, f"the weights in {what}")
    stages: list[tuple[NDArray[np.uint8], Event | None]] = [(device.pinned(STAGE_BYTES), None) for _ in range(2)]
    turn = 0
    try:
        for packed, data in contents(table, bundle):
            for start in range(0, len(data), STAGE_BYTES):
                piece = data[start : start + STAGE_BYTES]
                stage, sent = stages[turn]
                if sent is not None:
                    sent.synchronize()
                stage[: len(piece)] = piece
                device.send(block + offsets[packed.name] + start, stage[: len(piece)], stream)
                stages[turn] = (stage, Event(device, stream))
                turn = 1 - turn
        device.call("cuStreamSynchronize", stream)
    except BaseException:
        device.call("cuStreamSynchronize", stream)
        device.free(block)
        raise
    finally:
        for stage, _ in stages:
            device.unpin(stage)
    return block, {name: block + offset for name, offset in offsets.items()}

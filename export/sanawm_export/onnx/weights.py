"""One weight file shared by every graph of a model part, readable as safetensors and as ONNX external data."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sanawm.model.checkpoint.writers import Entry, Piece, write_safetensors

_IR_DTYPES = {"F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16}
_PIECE = 64 << 20
# Smaller constants stay in the graph, where a reader of the graph sees them.
INLINE_BYTES = 1024


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in one dtype each."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors (float32 or bfloat16) to a new safetensors file, a piece at a time."""
    entries = {name: Entry(name, tuple(t.shape), "bfloat16" if t.dtype == torch.bfloat16 else "float32") for name, t in tensors.items()}

    def fill(entry: Entry) -> Iterator[Piece]:
        flat = tensors[entry.key].detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, flat.numel(), _PIECE):
            yield memoryview(flat[start : start + _PIECE].numpy())  # type: ignore[arg-type]

    write_safetensors(path, entries, fill)


def link_weights(model: ir.Model, path: Path, prefixes: tuple[str, ...]) -> None:
    """Point the graph's weights into the file at `path`, which must lie beside the graph, under the checkpoint's names.

    An initializer named `<prefix>.<name>` is the file's `<name>`. Raises ValueError for a large initializer that the file does not hold.
    """
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    start = 8 + size
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        stored = next((name.removeprefix(p) for p in prefixes if name.startswith(p) and name.removeprefix(p) in header), None)
        if stored is None:
            if tensor.nbytes > INLINE_BYTES and name.startswith(prefixes):
                raise ValueError(f"{path.name} does not hold the weight {name}")
            continue
        value.name = stored
        if tensor.nbytes <= INLINE_BYTES:
            continue
        info = header[stored]
        begin, end = info["data_offsets"]
        if list(tensor.shape.numpy()) != info["shape"] or _IR_DTYPES[info["dtype"]] != tensor.dtype:
            raise ValueError(f"{path.name}: {stored} is {info['dtype']}{info['shape']} there and {tensor.dtype}{tensor.shape} in the graph")
        place = (path.name, start + begin, end - begin, tensor.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=ir.Shape(info["shape"]), name=stored, base_dir=path.parent)

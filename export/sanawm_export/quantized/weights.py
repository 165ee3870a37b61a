"""The weight file of a quantized transformer: one safetensors file that every graph points into.

e4m3 tensors are stored as F8_E4M3; e2m1 ones as U8 of half the row length, two elements a byte, the even one in the low nibble, which is also the
layout of ONNX's FLOAT4E2M1.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from sanawm_export.onnx.weights import INLINE_BYTES

_STORED = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float4_e2m1fn_x2: "U8",
}
_GRAPH = {"F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16, "F8_E4M3": ir.DataType.FLOAT8E4M3FN, "U8": ir.DataType.FLOAT4E2M1}
_PIECE = 64 << 20


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, a piece at a time; it appears only when it is complete."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _STORED:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which the weight file does not hold")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _STORED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                flat = _bytes(tensor)
                for start in range(0, flat.numel(), _PIECE):
                    file.write(flat[start : start + _PIECE].numpy().data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> Tensor:
    """The stored bytes, (n,) uint8."""
    whole = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
    return (whole.reshape(1) if whole.dim() == 0 else whole).view(torch.uint8).flatten()


def link_weights(model: ir.Model, path: Path, prefix: str) -> None:
    """Point the graph's weights into the file at `path`, which must lie beside the graph.

    An initializer named `<prefix><name>` is the file's `<name>`. Raises ValueError for one that the file does not hold, or holds otherwise.
    """
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        stored = name.removeprefix(prefix)
        if stored not in header:
            if name.startswith(prefix) and tensor.nbytes > INLINE_BYTES:
                raise ValueError(f"{path.name} does not hold the weight {name}")
            continue
        value.name = stored
        if tensor.nbytes <= INLINE_BYTES:
            continue
        info = header[stored]
        dtype, shape = _GRAPH[info["dtype"]], list(info["shape"])
        if dtype == ir.DataType.FLOAT4E2M1:
            shape[-1] *= 2
        if list(tensor.shape.numpy()) != shape or dtype != tensor.dtype:
            raise ValueError(f"{path.name}: {stored} is {dtype}{shape} there and {tensor.dtype}{tensor.shape} in the graph")
        begin, end = info["data_offsets"]
        value.const_value = ir.ExternalTensor(
            path.name, 8 + size + begin, end - begin, dtype, shape=ir.Shape(shape), name=stored, base_dir=path.parent
        )

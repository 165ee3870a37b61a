"""What an engine file says about itself: the compiled graph is in it as text.

The text is undocumented. It was read for one version (`READABLE`), and every function here refuses what does not look like that.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from sanawm.errors import EngineError
from sanawm_runtime.engines._trt_launch import architecture
from sanawm_runtime.engines._trt_library import RTX_VERSION

# Libraries whose plans these patterns were checked against.
READABLE = (("tensorrt_rtx", RTX_VERSION),)

# Sections: a four-letter tag, an unused word, offset and size. The graph comes first, the weights after it.
_SECTION = struct.Struct("<4sIQQ")
_GRAPH, _WEIGHTS = b"NGNE", b"THGW"
_SECTIONS_AT = 64

_BLOCK = re.compile(rb"header \{\n  version = \d+\n")
_ACCELERATORS = re.compile(rb"\n  accelerators=\{([^}]*)\}")
_MEMORY = re.compile(rb"region = \{ name=devmem size=(\d+) ")
_TENSOR = re.compile(rb'\n  (?:sub_)?tensor=\{ [^\n]*?name="([^"\n]+)"[^\n]* type=(\w+) \}')
_GEMM = re.compile(rb'\n  (fully_connected|corrltn)=\{ name="([^"\n]*)" output=\{([^}\n]*)\} input=\{([^}\n]*)\}[^\n]*? layers="([^"\n]*)"')
_ATTENTION = re.compile(rb"\n  function=\{ name=_gemm_mha")
_PLUGIN = re.compile(rb"\n  custom_layer=\{ name=")
_FUNCTION = re.compile(rb"\n  (?:function|runtime_fusion)=\{ name=")
_QUOTED = re.compile(rb'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_ELF, _EM_CUDA = b"\x7fELF\x02\x01\x01", struct.pack("<H", 190)

_WORDS = {"float": "fp32", "half": "fp16", "bf16": "bf16", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4"}


@dataclass(frozen=True)
class Gemm:
    """A compiled multiplication or convolution: the dtypes of its operands and the graph's nodes it was made of."""

    kind: str
    operands: tuple[str, ...]
    output: str
    layers: tuple[str, ...]

    @property
    def precision(self) -> str:
        """"nvfp4" (both operands, block scales beside them), "fp8", "bf16", "fp16", "fp32", or both operands' types where they differ."""
        first, second = (_WORDS.get(word, word) for word in self.operands[:2])
        if first == second == "fp4":
            return "nvfp4" if self.operands[2:].count("fp8_e4m3") >= 2 else "fp4"
        return first if first == second else f"{first} x {second}"


@dataclass(frozen=True)
class Plan:
    """The compiled graph of an engine file.

    accelerators: what it was compiled for ("sm120"). device_memory: bytes of activations and scratch that a context needs. attentions: fused
    attention kernels. functions: other generated kernels. plugins: plugin layers. cubins: architectures of the compiled kernels that plugins carry.
    """

    accelerators: tuple[str, ...]
    gemms: tuple[Gemm, ...]
    attentions: int
    functions: int
    plugins: int
    device_memory: int
    cubins: tuple[str, ...]
    weight_bytes: int


def read_plan(path: Path) -> Plan:
    """Read an engine file's graph. Raises EngineError when it does not look like the plans this was written for."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, size, weights = _sections(data, path)
        text = data[start : start + size]
    starts = [match.start() for match in _BLOCK.finditer(text)]
    if not starts:
        raise EngineError(f"{path.name}: no compiled graph was found in the engine; its format is not the one this version reads")
    blocks = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    accelerators = {name for block in blocks for m in _ACCELERATORS.finditer(block) for name in m[1].decode().split() if name != "*"}
    return Plan(
        accelerators=tuple(sorted(accelerators)),
        gemms=tuple(gemm for block in blocks for gemm in _gemms(block, path)),
        attentions=sum(len(_ATTENTION.findall(block)) for block in blocks),
        functions=sum(len(_FUNCTION.findall(block)) for block in blocks),
        plugins=sum(len(_PLUGIN.findall(block)) for block in blocks),
        device_memory=max((int(m[1]) for block in blocks for m in _MEMORY.finditer(block)), default=0),
        cubins=_cubins(text),
        weight_bytes=weights,
    )


def _sections(data: mmap.mmap, path: Path) -> tuple[int, int, int]:
    """Start and size of the graph's text, and size of the weights."""
    tables = {}
    if len(data) > _SECTIONS_AT + 2 * _SECTION.size:
        for i in range(2):
            tag, _, start, size = _SECTION.unpack_from(data, _SECTIONS_AT + i * _SECTION.size)
            tables[tag] = (start, size)
    if set(tables) != {_GRAPH, _WEIGHTS} or any(start + size > len(data) for start, size in tables.values()):
        raise EngineError(f"{path.name}: the engine's sections are not where this version looks for them; its format is another one")
    return *tables[_GRAPH], tables[_WEIGHTS][1]


def _gemms(block: bytes, path: Path) -> list[Gemm]:
    types = {match[1]: match[2].decode() for match in _TENSOR.finditer(block)}
    found = []
    for match in _GEMM.finditer(block):
        operands, outputs = ([types.get(name, "") for name in _QUOTED.findall(match[i])] for i in (4, 3))
        if not outputs or not all(operands[:2]) or len(operands) < 2:
            raise EngineError(f"{path.name}: {match[2].decode()} has operands of no known type; this version does not read such engines")
        found.append(Gemm(match[1].decode(), tuple(operands), outputs[0], tuple(_LAYER.findall(match[5].decode()))))
    return found


def _cubins(text: bytes) -> tuple[str, ...]:
    found, position = [], text.find(_ELF)
    while position >= 0:
        header = text[position : position + 64]
        if header[18:20] == _EM_CUDA:
            found.append(architecture(header))
        position = text.find(_ELF, position + 1)
    return tuple(found)

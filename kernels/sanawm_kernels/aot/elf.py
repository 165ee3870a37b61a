"""What a compiled kernel says about itself: architecture, registers, stack, shared memory and parameters, read from its ELF."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_CUDA = 190  # e_machine
# Attributes of the .nv.info sections: u8 format, u8 attribute, u16 size or value.
_SIZED = 4
_REGCOUNT, _FRAME_SIZE, _KPARAM_INFO, _REQUIRED_THREADS = 0x2F, 0x11, 0x17, 0x10


@dataclass(frozen=True)
class KernelCode:
    """One kernel in a cubin.

    arch: compute capability, major * 10 + minor. stack_bytes: per thread; spilled registers live there, so 0 means that nothing spills.
    static_shared: bytes of shared memory the code itself reserves. parameters: (offset, size) in bytes, in order. threads: block size the code
    was compiled for.
    """

    arch: int
    entry: str
    registers: int
    stack_bytes: int
    static_shared: int
    parameters: tuple[tuple[int, int], ...]
    threads: int


def read(cubin: bytes) -> KernelCode:
    """The only kernel of `cubin`; ValueError if the bytes are not a cubin with exactly one."""
    try:
        return _read(cubin)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError("not a readable cubin: its ELF is damaged") from error


def _read(cubin: bytes) -> KernelCode:
    if cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18)[0] != _CUDA:
        raise ValueError("not a cubin: expected a 64-bit ELF for CUDA")
    section_table, flags = struct.unpack_from("<QI", cubin, 40)
    entry_size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, section_table + i * entry_size) for i in range(count)]
    names = [_text(cubin, headers[names_at][4] + header[0]) for header in headers]
    sections = {name: (header[4], header[5]) for name, header in zip(names, headers)}
    entries = [name.removeprefix(".text.") for name in names if name.startswith(".text.")]
    if len(entries) != 1:
        raise ValueError(f"expected one kernel in the cubin, found {len(entries)}")
    entry = entries[0]

    symbols = headers[names.index(".symtab")]
    strings = headers[symbols[6]][4]
    index = next(i for i in range(symbols[5] // 24) if _text(cubin, strings + struct.unpack_from("<I", cubin, symbols[4] + 24 * i)[0]) == entry)
    of_kernel = {_REGCOUNT: 0, _FRAME_SIZE: 0}
    for attribute, payload in _attributes(cubin, *sections[".nv.info"]):
        if attribute in of_kernel:
            symbol, value = struct.unpack("<II", payload)
            if symbol == index:
                of_kernel[attribute] = value
    own = _attributes(cubin, *sections[f".nv.info.{entry}"])
    parameters = sorted(struct.unpack("<IHHI", payload) for attribute, payload in own if attribute == _KPARAM_INFO)
    threads = next((struct.unpack("<III", payload) for attribute, payload in own if attribute == _REQUIRED_THREADS), (0, 1, 1))
    # The capability moved within the flags with ABI version 8 (CUDA 13).
    arch = flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF
    return KernelCode(
        arch=arch, entry=entry, registers=of_kernel[_REGCOUNT], stack_bytes=of_kernel[_FRAME_SIZE],
        static_shared=sections.get(f".nv.shared.{entry}", (0, 0))[1],
        parameters=tuple((offset, size >> 18) for _, _, offset, size in sorted(parameters, key=lambda p: p[1])),
        threads=threads[0] * threads[1] * threads[2],
    )  # fmt: skip


def _attributes(cubin: bytes, start: int, size: int) -> list[tuple[int, bytes]]:
    found, at = [], start
    while at < start + size:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == _SIZED:
            found.append((attribute, cubin[at : at + length]))
            at += length
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()

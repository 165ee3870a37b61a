"""Coverage-guided fuzzing of what reads strangers' bytes, with atheris (`pip install atheris`).

    python tools/fuzz_readers.py manifest CORPUS -max_total_time=600

A crash is anything but a value or one of our errors; libFuzzer writes the input that caused it. The inputs found here are replayed by none of
the tests: a finding becomes an @example in `tests/runtime/test_fuzz.py`. What follows the reader's name goes to libFuzzer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sanawm", "sanawm_runtime"]):
    from sanawm.camera import load_poses, parse_actions
    from sanawm.errors import UserError
    from sanawm_runtime.bundle.manifest import parse_manifest
    from sanawm_runtime.serve.protocol import parse_message, unpack
    from sanawm_runtime.sign import parse_signatures

_FOLDER = Path(tempfile.mkdtemp(prefix="sanawm-fuzz-"))


def _poses(suffix: str) -> Callable[[bytes], object]:
    place = _FOLDER / f"input{suffix}"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return load_poses(place)

    return read


READERS: dict[str, Callable[[bytes], object]] = {
    "manifest": parse_manifest,
    "signature": parse_signatures,
    "message": lambda data: parse_message(data.decode("utf-8", "surrogateescape"), 4096),
    "binary": unpack,
    "actions": lambda data: parse_actions(data.decode("utf-8", "replace")),
    "npy": _poses(".npy"),
    "json": _poses(".json"),
    "txt": _poses(".txt"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: python {sys.argv[0]} {{{','.join(READERS)}}} [corpus and options of libFuzzer]")
    read = READERS[sys.argv.pop(1)]

    def once(data: bytes) -> None:
        try:
            read(data)
        except UserError as error:
            assert str(error)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

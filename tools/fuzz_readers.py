"""Coverage-guided fuzzing of what reads strangers' bytes, with atheris (`pip install atheris`).

    python tools/fuzz_readers.py manifest CORPUS -runs=100000
    python tools/fuzz_readers.py message CORPUS -max_total_time=600

A crash is anything but a value or one of our errors; libFuzzer writes the input that caused it. A finding becomes an @example in
`tests/runtime/test_fuzz.py`, which replays none of the inputs found here. What follows the reader's name goes to libFuzzer; an empty CORPUS
gets a few good inputs to begin with.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris
import numpy as np
from PIL import Image

with atheris.instrument_imports(include=["sanawm", "sanawm_runtime"]):
    from sanawm.camera import load_image, load_intrinsics, load_poses, parse_actions
    from sanawm.config import preset
    from sanawm.errors import UserError
    from sanawm_runtime.bundle import CheckpointEntry, FileEntry, Manifest, PrecisionEntry, ProgramEntry, TargetEntry, TensorEntry
    from sanawm_runtime.bundle.manifest import parse_manifest
    from sanawm_runtime.cache import Cache
    from sanawm_runtime.held import HeldKeys
    from sanawm_runtime.serve.protocol import Header, parse_message, unpack
    from sanawm_runtime.sign import parse_signatures

# Some readers take files: in memory where there is such a place.
_FOLDER = Path(tempfile.mkdtemp(prefix="sanawm-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _file(suffix: str, load: Callable[[Path], object]) -> Callable[[bytes], object]:
    place = _FOLDER / f"input{suffix}"

    def read(data: bytes) -> object:
        place.write_bytes(data)
        return load(place)

    return read


def _message(data: bytes) -> object:
    message = parse_message(data.decode("utf-8", "surrogateescape"), 4096)
    return HeldKeys(16).set(message.held) if hasattr(message, "held") else message


def _intrinsics(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    # Without a comma it would be the name of a file.
    return load_intrinsics(text if "," in text else text + ",", 3, (640, 384))


def _image(data: bytes) -> object:
    image = load_image(data, 40_000)
    assert image.size[0] * image.size[1] <= 40_000
    return image


def _cache(data: bytes) -> object:
    cache = Cache(_FOLDER / "cache")
    assert cache.put("key", b"value")
    cache._place("key").write_bytes(data)
    assert cache.get("key", 5) in (None, b"value")
    return None


READERS: dict[str, Callable[[bytes], object]] = {
    "manifest": parse_manifest,
    "signature": parse_signatures,
    "message": _message,
    "binary": unpack,
    "actions": lambda data: parse_actions(data.decode("utf-8", "replace")),
    "npy": _file(".npy", load_poses),
    "json": _file(".json", load_poses),
    "txt": _file(".txt", load_poses),
    "intrinsics": _intrinsics,
    "intrinsics_npy": _file(".npy", lambda place: load_intrinsics(str(place), 3, (640, 384))),
    "image": _image,
    "cache": _cache,
}


def _picture(form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint16).reshape(24, 32, 3).astype(np.uint8)).save(out, form)
    return out.getvalue()


def _array(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def _manifest() -> bytes:
    x = TensorEntry("x", "float32", (1, 2))
    return Manifest(
        name="a",
        created="2026-11-23T06:00:00Z",
        config=preset("tiny"),
        target=TargetEntry("cpu", "onnxruntime"),
        precision=PrecisionEntry("fp32"),
        programs={"decode": ProgramEntry("a.onnx", (x,), (x,), {})},
        files={"a.onnx": FileEntry(1, "0" * 64)},
        versions={},
        checkpoint=CheckpointEntry("a", "synthetic"),
    ).to_bytes()


def seeds(reader: str) -> Iterator[bytes]:
    """A few inputs that a reader understands, or nearly."""
    poses = np.tile(np.eye(4), (2, 1, 1))
    if reader == "manifest":
        yield _manifest()
    elif reader == "signature":
        yield json.dumps({"schema_version": 1, "signatures": [{"key": "0" * 64, "signature": "A" * 86 + "==", "algorithm": "ed25519"}]}).encode()
    elif reader == "message":
        yield json.dumps({"type": "start", "prompt": "a", "image": "upload", "seed": 1, "fov": 70.0}).encode()
        yield b'{"type": "keys", "held": "wd"}'
        yield b'{"type": "more", "chunks": 1}'
    elif reader == "binary":
        yield Header(1, 2, 3, 64, 64, 5, np.zeros((3, 4), np.float32)).pack() + b"body"
    elif reader == "actions":
        yield b"official-2026-05: w-48,dw-24,none-24"
    elif reader in ("npy", "intrinsics_npy"):
        yield _array(poses if reader == "npy" else np.ones((3, 4)))
    elif reader == "json":
        yield json.dumps(poses.tolist()).encode()
    elif reader == "txt":
        yield "\n".join(" ".join(map(str, row)) for row in poses.reshape(2, 16)).encode()
    elif reader == "intrinsics":
        yield b"500,500,320,192"
    elif reader == "image":
        yield from map(_picture, ("PNG", "JPEG", "WEBP", "BMP"))


def _plant(reader: str, arguments: list[str]) -> None:
    folders = [Path(argument) for argument in arguments if not argument.startswith("-")]
    if folders and not (folders[0].is_dir() and any(folders[0].iterdir())):
        folders[0].mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds(reader)):
            (folders[0] / f"seed{number}").write_bytes(data)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: python {sys.argv[0]} {{{','.join(READERS)}}} [corpus and options of libFuzzer]")
    name = sys.argv.pop(1)
    read = READERS[name]
    _plant(name, sys.argv[1:])

    def once(data: bytes) -> None:
        try:
            read(data)
        except UserError as error:
            assert str(error)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""A world without a model: an engine whose programs mix their inputs, so that sessions and servers can be tested in milliseconds."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sanawm.config import DiTConfig, TextConfig, VAEConfig, WorldConfig
from sanawm.errors import EngineError
from sanawm.programs import Geometry, TensorSpec, programs
from sanawm_runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    CheckpointEntry,
    FileEntry,
    Manifest,
    PrecisionEntry,
    ProgramEntry,
    TargetEntry,
    TensorEntry,
)
from sanawm_runtime.engines.base import Buffer, Engine

TOY = WorldConfig(
    name="toy",
    dit=DiTConfig(in_channels=4, hidden=16, depth=4, head_dim=8, cross_heads=2, caption_channels=16, text_tokens=384, height=2, width=2),
    vae=VAEConfig(latent_channels=4, encoder_widths=(8, 8, 8, 8), encoder_layers=(1,) * 5, decoder_widths=(8, 16, 32), decoder_layers=(1,) * 4),
    text=TextConfig(vocab=512, hidden=16, intermediate=16, layers=1, heads=2, kv_heads=1, head_dim=8, query_pre_attn_scalar=8),
)
_DTYPES = {"float32": np.float32, "int64": np.int64, "bool": np.bool_, "uint8": np.uint8}


class _Array(Buffer):
    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self.array = np.full(spec.shape, 77, _DTYPES[spec.dtype])


class ToyEngine(Engine):
    """Every output is the mean of a weighted mix of the inputs, so that whatever differs before differs after.

    `before_run` is called with each program's name and may sleep or raise. `calls` lists the programs run, with the thread that ran each;
    `overlaps` counts calls made while another one was running, which no caller may cause.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle = bundle
        self.calls: list[tuple[str, int]] = []
        self.before_run: Callable[[str], None] = lambda name: None
        self.activated: list[int] = []
        self.overlaps = 0
        self.closed = False
        self._busy = threading.Lock()

    def activate(self) -> None:
        self.activated.append(threading.get_ident())

    def allocate(self, spec: TensorSpec) -> Buffer:
        return _Array(spec)

    def write(self, buffer: Buffer, values: NDArray) -> None:
        assert values.shape == buffer.spec.shape
        buffer.array[...] = values

    def read(self, buffer: Buffer) -> NDArray:
        return buffer.array.copy()

    def load(self, program: str) -> None:
        self.bundle.read(self.bundle.manifest.programs[program].file)

    def run(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        if self.closed:
            raise EngineError("the engine is closed")
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1
            self._busy.acquire()
        try:
            self.calls.append((program, threading.get_ident()))
            self.before_run(program)
            self._mix(program, buffers)
        finally:
            self._busy.release()

    def _mix(self, program: str, buffers: Mapping[str, Buffer]) -> None:
        entry = self.bundle.manifest.programs[program]
        total = 0.0
        for tensor in entry.inputs:
            array = buffers[tensor.name].array
            weight = 1 + zlib_share(tensor.name)
            total += weight * float(np.asarray(array, np.float64).mean()) + 0.01 * float(np.asarray(array.flat[:3], np.float64).sum())
        for tensor in entry.outputs:
            array = buffers[tensor.name].array
            value = np.sin(total + zlib_share(tensor.name))
            if array.dtype == np.uint8:
                rows = np.linspace(0, 3, array.shape[1])[None, :, None, None] + np.arange(len(array))[:, None, None, None] / 8
                array[...] = 127 + 120 * np.sin(7 * total + rows + np.arange(3))
            elif array.dtype == np.bool_:
                array[...] = True
            else:
                array[...] = value

    def unload(self, program: str) -> None:
        self.calls.append((f"unload {program}", threading.get_ident()))

    def close(self) -> None:
        self.closed = True


def zlib_share(name: str) -> float:
    """A number from 0 to 1 that stands for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") / 65536


def slow(engine: ToyEngine, program: str, seconds: float) -> None:
    """Let every run of a program take at least so long."""
    before = engine.before_run

    def wait(name: str) -> None:
        before(name)
        if name.startswith(program):
            time.sleep(seconds)

    engine.before_run = wait


def png(width: int = 64, height: int = 64, **options: object) -> bytes:
    """The file of a noisy picture."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG", **options)
    return out.getvalue()


def write_toy_bundle(root: Path) -> Path:
    """A bundle whose programs are stubs that only `ToyEngine` can run."""
    from sanawm.model.checkpoint.tiny_tokenizer import CHI_PROMPT, write_tokenizer
    from sanawm.prompt import PromptTokenizer

    (root / "programs").mkdir(parents=True)
    (root / "prompt").mkdir()
    write_tokenizer(root / "prompt", TOY.text.vocab)
    chi = "\n".join(CHI_PROMPT)
    (root / "prompt" / "prompt.json").write_text(json.dumps({"chi": chi}))
    length = PromptTokenizer.from_file(root / "prompt" / "tokenizer.json", chi, TOY.dit.text_tokens).max_length
    entries = {}
    for name, program in programs(Geometry(TOY, length)).items():
        (root / "programs" / f"{name}.bin").write_bytes(name.encode())
        sides = [tuple(TensorEntry(t.name, t.dtype, t.shape) for t in side) for side in (program.inputs, program.outputs)]
        extras = {"tokenizer": "prompt/tokenizer.json", "prompt": "prompt/prompt.json"} if name == "text_encoder" else {}
        entries[name] = ProgramEntry(f"programs/{name}.bin", sides[0], sides[1], extras)
    found = sorted(path for path in root.rglob("*") if path.is_file())
    files = {p.relative_to(root).as_posix(): FileEntry(p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in found}
    manifest = Manifest(
        name="toy",
        created="2026-11-23T06:00:00Z",
        config=TOY,
        target=TargetEntry("cpu", "onnxruntime"),
        precision=PrecisionEntry("fp32"),
        programs=entries,
        files=files,
        versions={},
        checkpoint=CheckpointEntry("toy", "synthetic"),
    )
    (root / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return root

"""Device memory that a bundle of the CUDA engine takes, known from its files before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sanawm.errors import BundleError
from sanawm.programs import ENCODERS, Geometry, TensorSpec, programs
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.bundle.manifest import TensorEntry
from sanawm_runtime.engines._cuda_plan import largest_arenas
from sanawm_runtime.engines._cuda_weights import read_table
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.rollout import Rollout

_NEEDED = (*ENCODERS, "denoise_first", "prompt_kv", "decode")
_NAMES = {"dit": "transformer", "vae": "decoder", "text": "text encoder", "image": "image encoder"}


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that the engine asks the device for. What the driver keeps for contexts, code and graphs is not among them: 0.9 GB on an H200.

    weights: of each part, by its name. encoders: the parts that only a start needs. scratch: of all programs. stream: buffers and state of one
    stream, its prompt among them.
    """

    weights: Mapping[str, int]
    encoders: tuple[str, ...]
    scratch: int
    stream: int

    @property
    def whole(self) -> int:
        """With everything resident and one stream."""
        return sum(self.weights.values()) + self.scratch + self.stream

    @property
    def streaming(self) -> int:
        """`whole` without the encoders: what a stream takes once it has started."""
        return self.whole - sum(self.weights[name] for name in self.encoders)

    def __str__(self) -> str:
        parts = [*self.weights.items(), ("scratch", self.scratch), ("a stream", self.stream)]
        return ", ".join(f"{name} {size_text(size)}" for name, size in parts)


class _Counter:
    """An engine that only adds up what it is asked for."""

    def __init__(self) -> None:
        self.nbytes = 0

    def allocate(self, spec: TensorSpec) -> Buffer:
        self.nbytes += spec.nbytes
        return Buffer(spec)


def size_text(count: int) -> str:
    """Bytes as a person reads them: "14.53 GB"."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= scale:
            return f"{count / scale:.{digits}f} {unit}"
    return f"{count} B"


def device_memory(bundle: Bundle) -> DeviceMemory | None:
    """What the bundle's engine will ask the device for; None for other engines, and for bundles that lack a program of a stream.

    Raises BundleError for a manifest or tables that cannot be read.
    """
    manifest = bundle.manifest
    if manifest.target.engine != "cuda" or any(name not in manifest.programs for name in _NEEDED):
        return None
    scratch = sum(largest_arenas(manifest.programs).values())
    users: dict[str, set[str]] = {}
    for name, entry in manifest.programs.items():
        users.setdefault(str(entry.extras.get("weights", "")), set()).add(name)
    names = {table: _name(table) for table in users}
    weights = {names[table]: read_table(bundle.read(table), table).offsets()[1] for table in users}
    encoders = tuple(names[table] for table, having in users.items() if having <= set(ENCODERS))
    return DeviceMemory(weights, encoders, scratch, _stream(bundle))


def _name(table: str) -> str:
    stem = table.rpartition("/")[2].partition(".")[0]
    return _NAMES.get(stem, stem)


def _input(bundle: Bundle, program: str, name: str, axes: int) -> TensorEntry:
    found = next((t for t in bundle.manifest.programs[program].inputs if t.name == name and len(t.shape) == axes), None)
    if found is None:
        raise BundleError(f"bundle {bundle.root}: program {program} has other inputs; rebuild it with this version")
    return found


def _stream(bundle: Bundle) -> int:
    """Bytes of one stream's buffers: a stream is set up on an engine that counts."""
    config = bundle.manifest.config
    tokens, latents = _input(bundle, "text_encoder", "input_ids", 2), _input(bundle, "denoise_first", "latents", 5)
    geometry = Geometry(config, tokens.shape[1], latents.shape[2], latents.dtype)
    table, engine = programs(geometry), _Counter()
    world: Any = SimpleNamespace(engine=engine, programs=table, config=config, geometry=geometry)
    Rollout(world, {})
    for spec in (*table["text_encoder"].outputs, *table["prompt_kv"].outputs):
        engine.allocate(spec)
    return engine.nbytes

"""One program's build as a record that crosses the border of a process, and what comes back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sanawm.programs import Program, TensorSpec
from sanawm_export.tensorrt.audit import AuditRow
from sanawm_export.tensorrt.network import BuildOptions
from sanawm_runtime.engines._trt_library import EngineName


@dataclass(frozen=True)
class Job:
    """What to build: a lowered graph whose weights lie in `folder`, for a target, into the new file `out`.

    asked: precision of each layer. plugins: the graph has plugin nodes. weight_bytes: of the weights it uses, for the memory estimate.
    timing_cache: where kernel timings are kept, for a library that times kernels.
    """

    engine: EngineName
    capability: str
    program: Program
    graph: Path
    folder: Path
    out: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    asked: dict[str, str] = field(default_factory=dict)
    plugins: bool = False
    weight_bytes: int = 0
    timing_cache: Path | None = None

    @property
    def memory(self) -> int:
        """Estimate of the memory a build needs, in bytes: the library and its compilers, and the weights read, packed and written."""
        return 2**30 + int(3.3 * self.weight_bytes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        data: dict[str, Any] = json.loads(text)
        program = data.pop("program")
        sides = [tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["meaning"]) for t in program[side]) for side in ("inputs", "outputs")]
        paths = {name: Path(text) if (text := data.pop(name)) else None for name in ("graph", "folder", "out", "timing_cache")}
        return cls(**data | paths | {"program": Program(program["name"], *sides), "options": BuildOptions(**data["options"])})


@dataclass(frozen=True)
class Built:
    """A finished engine.

    seconds and peak_rss (bytes) of the process that built it; size and sha256 of the file; audited: whether the realised precision was read
    back; rows: the audit; device_memory: bytes of activations and scratch; weight_bytes: of constants; gemms, attentions, functions, plugins:
    compiled kernels by kind; cubins: architectures of the code that plugins carry.
    """

    seconds: float
    peak_rss: int
    size: int
    sha256: str
    library: str
    audited: bool = False
    rows: tuple[AuditRow, ...] = ()
    device_memory: int = 0
    weight_bytes: int = 0
    gemms: int = 0
    attentions: int = 0
    functions: int = 0
    plugins: int = 0
    cubins: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Built:
        data: dict[str, Any] = json.loads(text)
        rows = tuple(AuditRow(**row) for row in data.pop("rows"))
        return cls(**data | {"rows": rows, "cubins": tuple(data["cubins"]), "warnings": tuple(data["warnings"])})

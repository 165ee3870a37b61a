"""State buffers of a stream: what each chunk reads and writes, constant in size however long the stream."""

from __future__ import annotations

from collections.abc import Mapping

from sanawm.programs import ATTENTION_FIELDS, Geometry, TensorSpec, state_specs
from sanawm_runtime.engines.base import Buffer, Engine


def _rename(buffers: Mapping[str, Buffer], prefix: str) -> dict[str, Buffer]:
    return {f"{prefix}.{name.split('.', 1)[1]}": buffer for name, buffer in buffers.items()}


class StreamState:
    """Three sets of buffers: chunk 0's (whose attention entries stay as the sink), and two that steady chunks read and write in turn.

    `reads(kind)` and `writes(kind)` bind a chunk's programs; `advance(kind)` makes what was written the past of the next chunk.
    """

    def __init__(self, engine: Engine, geometry: Geometry) -> None:
        def make(specs: list[TensorSpec]) -> dict[str, Buffer]:
            return {spec.name: engine.allocate(spec) for spec in specs}

        self._first = make(state_specs(geometry, "first", "next"))
        self._steady = (make(state_specs(geometry, "steady", "next")), make(state_specs(geometry, "steady", "next")))
        self._turn = 0

    def writes(self, kind: str) -> dict[str, Buffer]:
        """Outputs of `commit_<kind>`."""
        return self._first if kind == "first" else self._steady[self._turn]

    def reads(self, kind: str) -> dict[str, Buffer]:
        """State inputs of `denoise_<kind>` and `commit_<kind>`."""
        if kind == "first":
            return {}
        if kind == "second":
            return _rename(self._first, "past")
        sink = {name: b for name, b in _rename(self._first, "sink").items() if name.rsplit(".", 1)[1] in ATTENTION_FIELDS}
        return sink | _rename(self._steady[1 - self._turn], "past")

    def advance(self, kind: str) -> None:
        """Call after `commit_<kind>`."""
        if kind != "first":
            self._turn = 1 - self._turn

    def restart(self) -> None:
        """Before another chunk 0."""
        self._turn = 0

    def copy_to(self, other: StreamState, engine: Engine) -> None:
        """Make `other` a copy that goes on by itself."""
        for mine, theirs in zip((self._first, *self._steady), (other._first, *other._steady)):
            for name, buffer in mine.items():
                engine.copy(buffer, theirs[name])
        other._turn = self._turn


class DecoderState:
    """Two sets of decoder state that frames read and write in turn."""

    def __init__(self, engine: Engine, specs: list[TensorSpec]) -> None:
        self._sets = tuple({s.name: engine.allocate(s) for s in specs} for _ in range(2))
        self._turn = 0

    def reads(self) -> dict[str, Buffer]:
        return _rename(self._sets[1 - self._turn], "past")

    def writes(self) -> dict[str, Buffer]:
        return self._sets[self._turn]

    def advance(self) -> None:
        self._turn = 1 - self._turn

    def copy_to(self, other: DecoderState, engine: Engine) -> None:
        """Make `other` a copy that goes on by itself."""
        for mine, theirs in zip(self._sets, other._sets):
            for name, buffer in mine.items():
                engine.copy(buffer, theirs[name])
        other._turn = self._turn

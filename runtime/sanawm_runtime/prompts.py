"""Prompts as cross-attention keys and values, remembered so that a repeated one needs no text encoder."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sanawm.programs import TensorSpec
from sanawm_runtime.cache import Cache
from sanawm_runtime.engines.base import Buffer

if TYPE_CHECKING:
    from sanawm_runtime.world import World

# About 50 MB at full size, where an embedding is 300 x 2304 float32.
_REMEMBERED = 16


class Prompts:
    """Encodes prompts on a world's engine; embeddings stay in memory, and in `cache` across processes.

    The caller holds the engine's turn.
    """

    def __init__(self, world: World, cache: Cache | None, free_encoder: bool) -> None:
        self._world = world
        self._cache = cache
        self._free_encoder = free_encoder
        self._embeddings: OrderedDict[str, dict[str, NDArray]] = OrderedDict()

    def buffers(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, Buffer]:
        """Text mask, keys and values of a tokenized prompt in buffers of their own, which nobody writes again."""
        engine, program = self._world.engine, self._world.programs["prompt_kv"]
        embedding = self._embedding(ids, mask)
        specs = {spec.name: spec for spec in self._world.programs["text_encoder"].outputs}
        text, text_mask = (engine.allocate(specs[name]) for name in ("text", "text_mask"))
        engine.write(text, embedding["text"])
        engine.write(text_mask, embedding["text_mask"])
        outputs = {spec.name: engine.allocate(spec) for spec in program.outputs}
        engine.run("prompt_kv", {"text": text, **outputs})
        return {"text_mask": text_mask, **outputs}

    def _embedding(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray]:
        key = hashlib.sha256(self._world.bundle.digest.encode() + ids.tobytes() + mask.tobytes()).hexdigest()
        found = self._embeddings.get(key)
        if found is None:
            specs = self._world.programs["text_encoder"].outputs
            found = self._load(key, specs) or self._encode(key, specs, ids, mask)
            self._embeddings[key] = found
            if len(self._embeddings) > _REMEMBERED:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return found

    def _encode(self, key: str, specs: tuple[TensorSpec, ...], ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray]:
        encoded = self._world.run_program("text_encoder", input_ids=ids, attention_mask=mask)
        if self._free_encoder:
            self._world.engine.unload("text_encoder")
        values = {spec.name: np.ascontiguousarray(self._world.engine.read(encoded[spec.name])) for spec in specs}
        if self._cache is not None:
            self._cache.put(key, b"".join(values[spec.name].tobytes() for spec in specs))
        return values

    def _load(self, key: str, specs: tuple[TensorSpec, ...]) -> dict[str, NDArray] | None:
        if self._cache is None:
            return None
        arrays: dict[str, NDArray] = {spec.name: np.empty(spec.shape, np.bool_ if spec.dtype == "bool" else np.float32) for spec in specs}
        data = self._cache.get(key, sum(array.nbytes for array in arrays.values()))
        if data is None:
            return None
        start = 0
        for array in arrays.values():
            array.ravel().view(np.uint8)[:] = np.frombuffer(data, np.uint8, array.nbytes, start)
            start += array.nbytes
        return arrays

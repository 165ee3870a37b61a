"""A checkpoint that exists as a seed alone: random weights of a given size, for measuring where nothing large can be moved."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from sanawm.config import WorldConfig


@dataclass(frozen=True)
class SyntheticCheckpoint:
    """What a build asks of a checkpoint, answered without files. Its weights are those of `sanawm.model.checkpoint.synth` with the same seed."""

    world: WorldConfig
    seed: int
    kind: str = "synthetic"
    commit: None = None

    @property
    def source(self) -> str:
        return f"synthetic:{self.world.name}:{self.seed}"

    def fingerprint(self) -> str:
        """SHA-256 of what defines the weights."""
        return hashlib.sha256(f"{self.source}/{self.world.to_json()}".encode()).hexdigest()


def synthetic_seed(source: str) -> int | None:
    """The seed of a synthetic checkpoint by its `source`, which bundles keep; None for another checkpoint."""
    found = re.fullmatch(r"synthetic:[^:]+:(\d+)", source)
    return int(found[1]) if found else None

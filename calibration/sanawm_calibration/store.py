"""The calibration file: JSON that people can read, and beside it the vectors and sampled rows.

Shapes: K channels of a source, R sampled rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sanawm.config import DiTConfig, WorldConfig
from sanawm_calibration.collect import Shard
from sanawm_calibration.errors import CalibrationError, RecipeError
from sanawm_calibration.recipe import LayerFormat
from sanawm_calibration.roles import Layer, quantizable
from sanawm_calibration.statistics import SourceStatistics, merge

SCHEMA = 1
# Timesteps and passes a full calibration has; programs that run once a chunk or a prompt have one label of their own.
_KEPT = ("channel_amax", "channel_mean", "rows")


@dataclass
class Calibration:
    """What is known about the inputs of every quantizable layer.

    `summary[source][label]` holds count, amax, p99.99, rms and kurtosis of a timestep or pass; `outliers[source]` the largest outlier
    channels; `tensors[source]` channel_amax and channel_mean (K,) and rows (R, K). `search` is the layer table that a search found.
    """

    checkpoint: dict[str, Any]
    config: WorldConfig
    clips: list[dict[str, Any]]
    settings: dict[str, Any]
    summary: dict[str, dict[str, dict[str, float]]]
    outliers: dict[str, list[tuple[int, float]]]
    tensors: dict[str, dict[str, Tensor]]
    search: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def channel_amax(self, layer: Layer) -> Tensor:
        """Largest magnitude of each input channel of a layer, (K,) float32."""
        return self._source(layer)["channel_amax"]

    def rows(self, layer: Layer) -> Tensor:
        """Sampled inputs of a layer, (R, K) bfloat16."""
        return self._source(layer)["rows"]

    def _source(self, layer: Layer) -> dict[str, Tensor]:
        if layer.source not in self.tensors:
            raise CalibrationError(f"{layer.name}: the calibration file has no statistics of its input; calibrate this checkpoint")
        return self.tensors[layer.source]

    def found_table(self) -> dict[str, LayerFormat] | None:
        """The layer formats of the search, None where none was run."""
        if self.search is None:
            return None
        try:
            return {name: LayerFormat(**data) for name, data in self.search["layers"].items()}
        except (KeyError, TypeError, AttributeError, RecipeError) as error:
            raise CalibrationError(f"the calibration file's search result is damaged ({error}); run sanawm calibrate --search again") from error

    def check_checkpoint(self, fingerprint: str) -> None:
        """Raise CalibrationError unless the statistics are those of the checkpoint with that fingerprint."""
        if self.checkpoint.get("fingerprint") != fingerprint:
            raise CalibrationError(
                f"the calibration is of another checkpoint ({self.checkpoint.get('source')}); run sanawm calibrate on the one that is built"
            )


def build(
    shards: Sequence[Shard],
    config: WorldConfig,
    *,
    checkpoint: dict[str, Any],
    clips: list[dict[str, Any]],
    settings: dict[str, Any],
    versions: dict[str, str] | None = None,
) -> Calibration:
    """Merge the clips' statistics. Raises CalibrationError naming a layer that never ran or whose inputs were all zero."""
    layers = quantizable(config.dit)
    for name, layer in layers.items():
        if not any(shard.calls.get(name) for shard in shards):
            raise CalibrationError(f"{name} was never exercised by the calibration set; add clips that reach it or repair the model")
        if all(shard.sources[layer.source].amax == 0 for shard in shards if layer.source in shard.sources):
            raise CalibrationError(f"{name} saw only zeros in the calibration set, from which no scale can be derived; check the checkpoint")
    sources = dict.fromkeys(layer.source for layer in layers.values())
    merged = {source: merge(shard.sources[source] for shard in shards if source in shard.sources) for source in sources}
    return Calibration(
        checkpoint,
        config,
        clips,
        settings,
        {source: {label: m.summary() for label, m in s.labels.items()} for source, s in merged.items()},
        {source: s.outliers() for source, s in merged.items()},
        {source: _tensors(s) for source, s in merged.items()},
        versions=versions or {},
    )


def _tensors(s: SourceStatistics) -> dict[str, Tensor]:
    return {"channel_amax": s.channel_amax, "channel_mean": s.channel_mean, "rows": s.rows.contiguous()}


def tensor_file(path: Path) -> Path:
    """Where the vectors of a calibration file lie."""
    return path.with_suffix(".safetensors")


def write(calibration: Calibration, path: Path) -> None:
    """Write `path` (JSON) and the vectors beside it; each appears only when it is complete, the JSON last."""
    if path.suffix != ".json":
        raise CalibrationError(f"{path}: expected the calibration file's name to end in .json")
    vectors = tensor_file(path)
    partial = [p.with_name(f".{p.name}.{os.getpid()}.partial") for p in (vectors, path)]
    try:
        save_file({f"{source}:{name}": t for source, part in calibration.tensors.items() for name, t in part.items()}, partial[0])
        data = {
            "schema": SCHEMA,
            "checkpoint": calibration.checkpoint,
            "config": calibration.config.to_json(),
            "clips": calibration.clips,
            "settings": calibration.settings,
            "versions": calibration.versions,
            "tensors": {"file": vectors.name, "sha256": _sha256(partial[0])},
            "sources": calibration.summary,
            "outliers": calibration.outliers,
            "search": calibration.search,
        }
        partial[0].chmod(0o644)
        partial[1].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial[0], vectors)
        os.replace(partial[1], path)
    finally:
        for file in partial:
            file.unlink(missing_ok=True)


def read(path: Path) -> Calibration:
    """Read a calibration file and its vectors. Raises CalibrationError where either is missing, damaged or of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise CalibrationError(f"{path} has schema {data.get('schema')} and this version reads {SCHEMA}; calibrate again")
        vectors = path.parent / Path(data["tensors"]["file"]).name
        if not vectors.is_file() or _sha256(vectors) != data["tensors"]["sha256"]:
            raise CalibrationError(f"{path}: its vectors {vectors.name} are missing or of another calibration; keep the two files together")
        tensors: dict[str, dict[str, Tensor]] = {}
        with safe_open(vectors, "pt") as file:
            for full in file.keys():  # noqa: SIM118 (not a mapping)
                source, _, name = full.partition(":")
                tensors.setdefault(source, {})[name] = file.get_tensor(full)
        _check_tensors(tensors, path)
        return Calibration(
            data["checkpoint"],
            WorldConfig.from_json(data["config"]),
            data["clips"],
            data["settings"],
            data["sources"],
            {source: [(int(i), float(r)) for i, r in found] for source, found in data["outliers"].items()},
            tensors,
            data["search"],
            data["versions"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CalibrationError(f"{path}: not a readable calibration file ({error}); calibrate again") from error


def _check_tensors(tensors: dict[str, dict[str, Tensor]], path: Path) -> None:
    for source, part in tensors.items():
        if set(part) != set(_KEPT) or not all(bool(torch.isfinite(t.float()).all()) for t in part.values()):
            raise CalibrationError(f"{path}: the vectors of {source} are incomplete or not finite; calibrate again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def missing_layers(calibration: Calibration, config: DiTConfig, names: Iterable[str]) -> list[str]:
    """Those of the named layers whose input the calibration does not know."""
    layers = quantizable(config)
    return [name for name in names if layers[name].source not in calibration.tensors]

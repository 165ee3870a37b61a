"""Where a build's graphs come from: the exported programs of a checkpoint in the precision asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sanawm.errors import UserError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm.programs import PARTS, Geometry, Program, programs
from sanawm_export.check import PROGRAM, check_export
from sanawm_export.onnx.export import ExportedProgram, export_part
from sanawm_export.parts import load_part
from sanawm_export.provenance import calibration_summary, file_digest
from sanawm_export.tensorrt.euler import euler_programs, write_euler

# Precisions that keep every layer in the activations' dtype; all others are recipes.
PLAIN = {"bf16": "bfloat16", "fp32": "float32"}
QUANTIZED_PART = "dit"


class GraphSource:
    """The programs of a checkpoint as ONNX files, written as they are asked for. Raises UserError for a precision that cannot be exported."""

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry, precision: str) -> None:
        self.geometry = geometry
        self.checkpoint = checkpoint
        self.precision = precision
        self._euler = euler_programs(geometry)
        self.table: dict[str, Program] = {**programs(geometry), **self._euler}

    @property
    def formats(self) -> set[str]:
        """The arithmetic that layers are computed in, in the target table's words."""
        return {self.precision}

    def facts(self) -> dict[str, Any]:
        """What the graphs depend on besides checkpoint and configuration."""
        return {"precision": self.precision}

    def summary(self) -> dict[str, Any] | None:
        """What the manifest says about calibration."""
        return None

    def recipe(self, program: str) -> Mapping[str, str]:
        """Precision that the recipe gives each layer of an exported program; empty where there is no recipe."""
        return {}

    def export(self, names: Collection[str], folder: Path) -> Iterator[tuple[Program, Path]]:
        """Export the named programs one at a time into `folder`, with the weight files they share."""
        for name in [n for n in self._euler if n in names]:
            write_euler(self._euler[name], folder / f"{name}.onnx")
            yield self._euler[name], folder / f"{name}.onnx"
        for part_name in PARTS:
            chosen = [n for n in programs(self.geometry, (part_name,)) if n in names]
            if not chosen:
                continue
            part = load_part(self.checkpoint, part_name, getattr(torch, self.geometry.dtype))
            for exported in self._export_part(part_name, part, chosen, folder):
                yield exported.program, folder / exported.file
            del part

    def reference(self) -> SanaWM:
        """The torch model that the graphs must agree with."""
        model = load_part(self.checkpoint, QUANTIZED_PART, getattr(torch, self.geometry.dtype))
        assert isinstance(model, SanaWM)
        return model

    def check(self) -> dict[str, Any]:
        """Compare an exported graph with `reference`: what the manifest says about parity."""

        def export(folder: Path) -> Path:
            ((_, file),) = self.export([PROGRAM], folder)
            return file

        return check_export(export, self.reference, self.geometry, self.compared_with)

    @property
    def compared_with(self) -> str:
        """`reference` in words."""
        return f"the torch model in {self.geometry.dtype}"

    def _export_part(self, name: str, part: Any, chosen: list[str], folder: Path) -> Iterator[ExportedProgram]:
        return export_part(name, part, self.geometry, folder, names=chosen)


class QuantizedSource(GraphSource):
    """The same with the transformer quantized by a recipe, with the scales of a calibration file.

    `merge` stacks the attention's projections of equal format into one product each.
    """

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry, recipe: str, calibration: Path | None, *, merge: bool) -> None:
        from sanawm_calibration.recipe import layer_table, load_recipe
        from sanawm_calibration.store import read

        super().__init__(checkpoint, geometry, recipe)
        if calibration is None:
            raise UserError(f"--precision {recipe} needs calibrated scales; run `sanawm calibrate` and give its file with --calibration")
        self._file, self._merge = calibration, merge
        self._calibration = read(calibration)
        self._calibration.check_checkpoint(checkpoint.fingerprint())
        self._recipe = load_recipe(recipe)
        self._asked = layer_table(self._recipe, geometry.config.dit, self._calibration.found_table())
        self._table: dict[str, str] = {}

    @property
    def formats(self) -> set[str]:
        return {layer.format for layer in self._asked.values()}

    def facts(self) -> dict[str, Any]:
        layers = {name: layer.to_json() for name, layer in self._asked.items()}
        return {"layers": layers, "calibration": file_digest(self._file), "merge": self._merge}

    def summary(self) -> dict[str, Any] | None:
        return calibration_summary(self._recipe, self._calibration, self._file)

    def reference(self) -> SanaWM:
        from sanawm_calibration.apply import fake_quantized, quantize_model

        model = super().reference()
        fake_quantized(model, quantize_model(model, self._asked, self._calibration, merge=self._merge))
        return model

    @property
    def compared_with(self) -> str:
        return f"the fake-quantized torch model in {self.geometry.dtype}"

    def recipe(self, program: str) -> Mapping[str, str]:
        return {} if program not in programs(self.geometry, (QUANTIZED_PART,)) else self._table

    def _export_part(self, name: str, part: Any, chosen: list[str], folder: Path) -> Iterator[ExportedProgram]:
        from sanawm_export.quantized.export import export_prepared, prepare_export

        if name != QUANTIZED_PART:
            yield from super()._export_part(name, part, chosen, folder)
            return
        assert isinstance(part, SanaWM)
        quantized = prepare_export(part, self._calibration, self._recipe, merge=self._merge)
        # The recipe speaks of layers; products in the model's dtype keep the dtype that the graph gives them.
        self._table = {layer: entry.format for layer, entry in quantized.table.items() if entry.format != "bf16"}
        yield from export_prepared(part, quantized, self.geometry, folder, names=chosen)


def graph_source(checkpoint: Checkpoint, geometry: Geometry, precision: str, calibration: Path | None, *, merge: bool) -> GraphSource:
    """The source for a precision: "bf16", "fp32", a recipe's name, or the path of a recipe file. Raises UserError."""
    if precision in PLAIN:
        return GraphSource(checkpoint, geometry, precision)
    return QuantizedSource(checkpoint, geometry, precision, calibration, merge=merge)

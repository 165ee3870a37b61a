"""A recipe with the scales of a calibration file, and the quantized weights that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sanawm.config import DiTConfig
from sanawm.errors import UserError
from sanawm.model.checkpoint import Checkpoint
from sanawm.model.dit import SanaWM
from sanawm_calibration.apply import QuantizedModel, quantize_model
from sanawm_calibration.quantize import PackedLinear
from sanawm_calibration.recipe import LayerFormat, Recipe, counts, layer_table, load_recipe
from sanawm_calibration.roles import Layer, quantizable
from sanawm_calibration.scales import fp8_scale, nvfp4_scale
from sanawm_calibration.store import Calibration, read
from sanawm_export.cuda.formats import Formats, formats_for
from sanawm_export.cuda.recipes import RecipeFormats, ScaleOf, recipe_formats
from sanawm_export.provenance import calibration_summary
from sanawm_kernels.quant.formats import Nvfp4Tensor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibratedRecipe:
    """A recipe with the scales of a calibration file, for one checkpoint."""

    recipe: Recipe
    file: Path
    calibration: Calibration
    found: RecipeFormats

    @property
    def formats(self) -> Formats:
        return self.found.formats

    def summary(self) -> dict[str, Any]:
        """What the manifest says about the layers: their number by format, and those that were widened."""
        return {"layers": counts(self.found.table), "widened": [asdict(entry) for entry in self.found.widened]}

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about calibration."""
        return calibration_summary(self.recipe, self.calibration, self.file)

    def quantize(self, model: SanaWM, progress: Progress | None = None) -> dict[str, NDArray[np.uint8]]:
        """Bytes of the quantized weights by packed name. `model` is taken apart: its layers are merged and their weights freed."""
        quantized = quantize_model(model, self.found.table, self.calibration, merge=True, keep_weights=False, progress=progress)
        return packed_weights(quantized, self.found, model.config)


def calibrated_recipe(precision: str, calibration: Path, config: DiTConfig, fingerprint: str | None = None) -> CalibratedRecipe:
    """The recipe of that name, or in that .toml file, with a calibration's scales.

    `fingerprint` is the checkpoint's, which must be the calibrated one; without it only the model's configuration must be. Raises UserError.
    """
    recipe, known = load_recipe(precision), read(calibration)
    if fingerprint is not None:
        known.check_checkpoint(fingerprint)
    if known.config.dit != config:
        raise UserError(f"{calibration} is of a model of another size ({known.config.name}); run `sanawm calibrate` on the one that is built")
    table = layer_table(recipe, config, known.found_table())
    return CalibratedRecipe(recipe, calibration, known, recipe_formats(config, table, calibrated_scale(known)))


def calibrated_scale(calibration: Calibration) -> ScaleOf:
    """Static activation scales as `sanawm_calibration.quantize_linear` derives them."""

    def scale(layer: Layer, entry: LayerFormat) -> float:
        derive = nvfp4_scale if entry.format == "nvfp4" else fp8_scale
        return derive(float(calibration.channel_amax(layer).amax()), f"{layer.name}, input")

    return scale


def build_formats(checkpoint: Checkpoint, precision: str, calibration: Path | None) -> tuple[Formats, CalibratedRecipe | None]:
    """Formats of a build, and the recipe where there is a calibration. Raises UserError."""
    config = checkpoint.world.dit
    if calibration is None:
        return formats_for(config, precision), None
    found = calibrated_recipe(precision, calibration, config, checkpoint.fingerprint())
    return found.formats, found


def packed_weights(quantized: QuantizedModel, found: RecipeFormats, config: DiTConfig) -> dict[str, NDArray[np.uint8]]:
    """Bytes of codes and scales of every quantized product by packed name.

    Raises ValueError where a layer's activation scale is not the one that the plan was made with.
    """
    merged = {frozenset(members): name for name, members in quantized.members.items()}
    known = quantizable(config)
    tensors: dict[str, NDArray[np.uint8]] = {}
    for packed, members in found.layers.items():
        name = merged.get(frozenset(members), members[0])
        layer = quantized.packed[name]
        if layer.input_scale != found.formats.of(packed).scale:
            raise ValueError(f"{packed}: the plan's activation scale is {found.formats.of(packed).scale} and the layer's {layer.input_scale}")
        order = _order(quantized.members.get(name, members), members, known)
        tensors |= {f"{packed}.{part}": data for part, data in _parts(layer, order).items()}
    return tensors


def _order(stored: Iterable[str], wanted: Iterable[str], layers: Mapping[str, Layer]) -> NDArray[np.int64]:
    """Rows of a merged weight whose members were stacked as `stored`, in the order of `wanted`; padding stays last."""
    starts, start = {}, 0
    for name in stored:
        starts[name], start = start, start + layers[name].rows
    return np.concatenate([np.arange(starts[name], starts[name] + layers[name].rows) for name in wanted])


def _parts(layer: PackedLinear, order: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]]:
    """Codes and scales as the kernels read them, with rows in that order."""
    weight = layer.weight
    if isinstance(weight, Nvfp4Tensor):
        return {"codes": _rows(weight.packed, order), "blocks": _rows(weight.scales, order), "global": _flat(weight.global_scale)}
    return {"codes": _rows(weight.values, order), "scales": _flat(weight.scale)}


def _flat(x: torch.Tensor) -> NDArray[np.uint8]:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _rows(x: torch.Tensor, order: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Bytes of a two-dimensional tensor with its first rows reordered."""
    data = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    if np.array_equal(order, np.arange(len(order))):
        return data.reshape(-1)
    return np.concatenate((data[order], data[len(order) :])).reshape(-1)

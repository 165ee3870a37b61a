"""A recipe applied to the whole transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.merge import merge_projections
from sanawm_calibration.quantize import FakeQuantLinear, PackedLinear, quantize_linear
from sanawm_calibration.recipe import LayerFormat, LayerTable
from sanawm_calibration.roles import quantizable
from sanawm_calibration.store import Calibration

# layer name, layers done, layers in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QuantizedModel:
    """The quantized layers of a transformer. `table` has the format of every product, with merged ones in place of their members."""

    table: LayerTable
    packed: dict[str, PackedLinear]
    members: dict[str, tuple[str, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized layers as stored."""
        return sum(layer.nbytes for layer in self.packed.values())


def quantize_model(
    model: SanaWM,
    table: Mapping[str, LayerFormat],
    calibration: Calibration,
    *,
    merge: bool = False,
    keep_weights: bool = True,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize the layers of a transformer as `table` says, one at a time.

    The model is linearized, and with `merge` its attention projections are merged, in place. Without `keep_weights` each layer's own weight
    is freed as soon as it is packed, so that memory shrinks; the model then only serves to be exported. Raises CalibrationError naming the
    layer at fault.
    """
    linearize(model)
    merged_table, members = merge_projections(model, table) if merge else (dict(table), {})
    layers = quantizable(model.config)
    packed: dict[str, PackedLinear] = {}
    todo = [name for name, layer_format in merged_table.items() if layer_format.format != "bf16"]
    for done, name in enumerate(todo):
        if progress:
            progress(name, done, len(todo))
        layer = layers[members[name][0] if name in members else name]
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        amax = calibration.channel_amax(layer)
        if len(amax) != linear.in_features:
            raise CalibrationError(f"{name} has {linear.in_features} inputs and the calibration knows {len(amax)}; calibrate this checkpoint")
        device = linear.weight.device
        packed[name] = quantize_linear(name, linear, merged_table[name], amax.to(device), calibration.rows(layer))
        if not keep_weights:
            linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    return QuantizedModel(merged_table, packed, members)


def replace_layers(model: SanaWM, quantized: QuantizedModel, make: Callable[[PackedLinear], nn.Module]) -> SanaWM:
    """Put `make(layer)` where each quantized layer is, in place."""
    for name, layer in quantized.packed.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.ModuleList):
            owner[int(child)] = make(layer)
        else:
            setattr(owner, child, make(layer))
    return model


def fake_quantized(model: SanaWM, quantized: QuantizedModel) -> SanaWM:
    """The model with its quantized layers computed as packed, in the model's dtype; in place."""
    dtype = model.dtype
    return replace_layers(model, quantized, lambda layer: FakeQuantLinear(layer, dtype))

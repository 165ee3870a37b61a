"""Number formats of the engine's products by a recipe's layer table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sanawm.config import DiTConfig
from sanawm.errors import UserError
from sanawm_calibration.recipe import WEIGHT_BITS, LayerFormat, LayerTable, layer_table, load_recipe
from sanawm_calibration.roles import Layer, quantizable
from sanawm_export.cuda.formats import GATES, PRECISIONS, PROJECTIONS, Format, Formats, formats_for

# Products by packed name and the layers they are made of, both within a block, besides those of the modulated input.
_LAYERS = {
    "out_cam": "attn.out_proj_cam", "proj": "attn.proj", "plucker": "plucker_proj", "cross_q": "cross_attn.q_linear",
    "cross_kv": "cross_attn.kv_linear", "cross_proj": "cross_attn.proj", "inverted": "mlp.inverted_conv.conv", "point": "mlp.point_conv.conv",
    "temporal": "mlp.t_conv",
}  # fmt: skip
# The camera branch's queries, keys and values are read with one row stride: they are one product.
_TOGETHER = ("q_proj_cam", "k_proj_cam", "v_proj_cam")
_REASON = "the kernels read the camera branch's queries, keys and values from one product"
# The static activation scale of a layer in a format.
ScaleOf = Callable[[Layer, LayerFormat], float]


@dataclass(frozen=True)
class Widened:
    """A layer that is computed in another format than the recipe asks for, and why."""

    layer: str
    asked: str
    given: str
    reason: str = _REASON


@dataclass(frozen=True)
class RecipeFormats:
    """A recipe on the engine's products: the table with widened layers, the formats by packed name, and each quantized product's layers."""

    table: LayerTable
    formats: Formats
    layers: Mapping[str, tuple[str, ...]]
    widened: tuple[Widened, ...] = ()


def recipe_formats(config: DiTConfig, asked: Mapping[str, LayerFormat], scale_of: ScaleOf) -> RecipeFormats:
    """Formats of the products of a layer table.

    Layers of a block's modulated input are merged where their formats are equal, as `sanawm_calibration.merge` does; the camera's three share the
    widest of theirs. Raises UserError for AWQ and low-rank corrections, which the kernels do not compute.
    """
    for name, entry in asked.items():
        if entry.awq or entry.lowrank:
            raise UserError(
                f"the cuda engine has no kernels for awq and lowrank, found {entry.label} for {name}; remove them from the recipe, "
                "or use --engine tensorrt_rtx"
            )
    table, widened = _widen(config, asked)
    known = quantizable(config)
    formats: dict[str, Format] = {}
    layers: dict[str, tuple[str, ...]] = {}
    splits: dict[int, tuple[tuple[str, ...], ...]] = {}

    def add(packed: str, members: tuple[str, ...]) -> None:
        entry = table[members[0]]
        if entry.format != "bf16":
            formats[packed] = Format(entry.format, scale_of(known[members[0]], entry), entry.label)
            layers[packed] = members

    for i in range(config.depth):
        groups = _groups(config, table, i)
        if groups:
            splits[i] = groups
        for packed, group in Formats(splits=splits).merged(i).items() if groups else ():
            if group != GATES:
                add(packed, tuple(f"blocks.{i}.attn.{layer}" for layer in group))
        for part, layer in _LAYERS.items():
            add(f"blocks.{i}.{part}", (f"blocks.{i}.{layer}",))
    return RecipeFormats(table, Formats(formats, splits), layers, widened)


def _widen(config: DiTConfig, asked: Mapping[str, LayerFormat]) -> tuple[LayerTable, tuple[Widened, ...]]:
    table, widened = dict(asked), []
    for i in range(config.depth):
        names = [f"blocks.{i}.attn.{layer}" for layer in _TOGETHER]
        widest = max((table[name] for name in names), key=lambda entry: WEIGHT_BITS[entry.format])
        for name in names:
            if table[name] != widest:
                widened.append(Widened(name, table[name].label, widest.label))
                table[name] = widest
    return table, tuple(widened)


def _groups(config: DiTConfig, table: Mapping[str, LayerFormat], block: int) -> tuple[tuple[str, ...], ...]:
    """Layers of each product of a block's modulated input but its gates; none where nothing there is quantized, and one product makes all."""
    found: dict[LayerFormat, list[str]] = {}
    for layer in PROJECTIONS:
        found.setdefault(table[f"blocks.{block}.attn.{layer}"], []).append(layer)
    if all(entry.format == "bf16" for entry in found):
        return ()
    return tuple(tuple(group) for group in found.values())


def planned_formats(config: DiTConfig, precision: str, calibration: Path | None) -> Formats:
    """Formats of a plan that is only looked at. Raises UserError.

    As `build-engine` takes them; without calibration also those of recipes that a build would refuse, since no launch depends on the scales.
    """
    if calibration is not None:
        from sanawm_export.cuda.calibrated import calibrated_recipe  # imports torch, which a plan without weights does not need

        return calibrated_recipe(precision, calibration, config).formats
    if precision in PRECISIONS:
        return formats_for(config, precision)
    return recipe_formats(config, layer_table(load_recipe(precision), config), lambda layer, entry: 1.0).formats

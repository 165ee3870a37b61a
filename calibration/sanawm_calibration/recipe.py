"""Precision recipes: which format each layer gets, read from small TOML files.

A file holds a `description` and a list of `[[layers]]` rules; later rules override earlier ones, and what no rule names stays in bfloat16:

    [[layers]]
    tiers = ["A"]            # or roles = ["qkv", ...]
    blocks = "6-19"          # optional
    format = "nvfp4"         # bf16, fp8, nvfp4
    scales = "mse"           # rtn, mse, four-over-six; of NVFP4 weights
    awq = false              # optional: activation-aware channel scaling
    lowrank = 0              # optional: rank of a bfloat16 correction
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sanawm.config import DiTConfig
from sanawm_calibration.errors import RecipeError
from sanawm_calibration.roles import ROLE_NAMES, ROLES, Layer, model_layers

Format = Literal["bf16", "fp8", "nvfp4"]
Scales = Literal["rtn", "mse", "four-over-six"]
BLOCK = 16
_FOLDER = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "nvfp4-guarded"
# Bits a weight takes with its share of block scales.
WEIGHT_BITS: dict[Format, float] = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}


@dataclass(frozen=True)
class LayerFormat:
    """How a layer is stored and multiplied.

    `scales` is how NVFP4 weight block scales are chosen; `awq` scales input channels before quantization; `lowrank` is the rank of a
    correction kept in the model's dtype, 0 for none.
    """

    format: Format = "bf16"
    scales: Scales = "rtn"
    awq: bool = False
    lowrank: int = 0

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise RecipeError(f"unknown format '{self.format}'; choose one of {', '.join(get_args(Format))}")
        if self.scales not in get_args(Scales):
            raise RecipeError(f"unknown scales '{self.scales}'; choose one of {', '.join(get_args(Scales))}")
        if not isinstance(self.awq, bool):
            raise RecipeError(f"expected awq = true or false, found {self.awq!r}")
        if isinstance(self.lowrank, bool) or not isinstance(self.lowrank, int) or self.lowrank < 0:
            raise RecipeError(f"expected lowrank to be a rank from 0 up, found {self.lowrank!r}")
        if self.format != "nvfp4" and (self.scales != "rtn" or self.awq or self.lowrank):
            raise RecipeError(f"scales, awq and lowrank belong to nvfp4, found them with {self.format}; remove them")

    @property
    def label(self) -> str:
        """Such as `nvfp4/mse+awq+r32`."""
        if self.format != "nvfp4":
            return self.format
        return f"nvfp4/{self.scales}" + ("+awq" if self.awq else "") + (f"+r{self.lowrank}" if self.lowrank else "")

    def weight_bytes(self, layer: Layer) -> float:
        """Bytes of a layer's weights with scales and correction; biases are not counted."""
        size = layer.weights * WEIGHT_BITS[self.format] / 8
        if self.lowrank:
            size += 2 * self.lowrank * (layer.rows + layer.columns)
        return size + (2 * layer.columns if self.awq else 0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


LayerTable = dict[str, LayerFormat]


@dataclass(frozen=True)
class Rule:
    """A rule of a recipe: the layers it names and their format."""

    roles: tuple[str, ...]
    blocks: tuple[int, int] | None
    layer_format: LayerFormat

    def matches(self, layer: Layer) -> bool:
        inside = self.blocks is None or (layer.block is not None and self.blocks[0] <= layer.block <= self.blocks[1])
        return layer.role.name in self.roles and inside


@dataclass(frozen=True)
class Recipe:
    """A named precision policy. With `from_search` the layers come from the search that `sanawm calibrate --search` ran."""

    name: str
    description: str
    rules: tuple[Rule, ...] = ()
    from_search: bool = False


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def load_recipe(name: str | Path) -> Recipe:
    """The recipe of that name, or in the .toml file at that path. Raises RecipeError."""
    text, label = _read(name)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{label} is not valid TOML ({error}); correct it") from error
    try:
        return _recipe(Path(str(name)).stem, data)
    except RecipeError as error:
        raise RecipeError(f"{label}: {error}") from error


def _read(name: str | Path) -> tuple[str, str]:
    path = Path(name)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read ({error}); check the path") from error
    if str(name) not in recipe_names():
        raise RecipeError(f"unknown recipe '{name}'; choose one of {', '.join(recipe_names())}, or give the path of a .toml file")
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8"), f"recipe {name}"


def _recipe(name: str, data: dict[str, Any]) -> Recipe:
    _only(data, {"description", "layers", "from_search"}, "the recipe")
    description, rules, from_search = data.get("description", ""), data.get("layers", []), data.get("from_search", False)
    if not isinstance(description, str) or not isinstance(rules, list) or not isinstance(from_search, bool):
        raise RecipeError("expected a description in quotes, [[layers]] tables, and from_search = true or false")
    if from_search and rules:
        raise RecipeError("a recipe comes from a search or from [[layers]] rules, found both; remove one")
    return Recipe(name, description, tuple(_rule(number, rule) for number, rule in enumerate(rules, start=1)), from_search)


def _rule(number: int, data: Any) -> Rule:
    where = f"rule {number}"
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a [[layers]] table, found {type(data).__name__}")
    fields = {field.name for field in dataclasses.fields(LayerFormat)}
    _only(data, fields | {"roles", "tiers", "blocks"}, where)
    if "format" not in data:
        raise RecipeError(f"{where}: no format is given; write format = \"fp8\", \"nvfp4\" or \"bf16\"")
    try:
        layer_format = LayerFormat(**{key: value for key, value in data.items() if key in fields})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    roles = _roles(where, data)
    if layer_format.format != "bf16" and (kept := sorted({r.name for r in ROLES if r.name in roles and r.tier == "C"})):
        raise RecipeError(f"{where}: {', '.join(kept)} cannot be quantized, their products stay in bf16; remove them from the rule")
    return Rule(roles, _blocks(where, data.get("blocks")), layer_format)


def _roles(where: str, data: dict[str, Any]) -> tuple[str, ...]:
    if ("roles" in data) == ("tiers" in data):
        raise RecipeError(f"{where}: expected either roles or tiers")
    key, known = ("roles", ROLE_NAMES) if "roles" in data else ("tiers", get_args(Literal["A", "B", "C"]))
    names = data[key]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RecipeError(f"{where}: expected {key} to be a list of names")
    if unknown := [n for n in names if n not in known]:
        raise RecipeError(f"{where}: unknown {key} {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(names) if key == "roles" else tuple(role.name for role in ROLES if role.tier in names)


def _blocks(where: str, text: Any) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = str(text).partition("-")
    if not isinstance(text, str) or not first.isdecimal() or not (last or first).isdecimal() or int(first) > int(last or first):
        raise RecipeError(f"{where}: expected blocks as \"3\" or \"6-19\", found {text!r}")
    return int(first), int(last or first)


def _only(data: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(data) - known):
        raise RecipeError(f"{where} has unknown settings {', '.join(unknown)}; the known ones are {', '.join(sorted(known))}")


def layer_table(recipe: Recipe, config: DiTConfig, found: Mapping[str, LayerFormat] | None = None) -> LayerTable:
    """The format of every matrix product by layer name.

    `found` is the result of a search, which a recipe with `from_search` needs. Raises RecipeError for a rule that matches nothing in this
    model, for NVFP4 on rows that are not a multiple of 16 long, and for a search result of another model.
    """
    layers = model_layers(config)
    if recipe.from_search:
        table = _searched(recipe, layers, found)
    else:
        table = dict.fromkeys(layers, LayerFormat())
        for number, rule in enumerate(recipe.rules, start=1):
            if not (named := [name for name, layer in layers.items() if rule.matches(layer)]):
                raise RecipeError(f"recipe {recipe.name}, rule {number}: no layer of this model matches; the blocks are 0 to {config.depth - 1}")
            table |= dict.fromkeys(named, rule.layer_format)
    for name, layer_format in table.items():
        layer = layers[name]
        if layer_format.format == "nvfp4" and layer.columns % BLOCK:
            raise RecipeError(f"{name} has rows of {layer.columns} weights and NVFP4 needs a multiple of {BLOCK}; give it fp8")
        if layer_format.lowrank > min(layer.rows, layer.columns):
            raise RecipeError(f"{name} is {layer.rows}x{layer.columns}, too small for a correction of rank {layer_format.lowrank}; lower it")
    return table


def _searched(recipe: Recipe, layers: Mapping[str, Layer], found: Mapping[str, LayerFormat] | None) -> LayerTable:
    if found is None:
        raise RecipeError(f"recipe {recipe.name} is the result of a search, and the calibration file has none; run sanawm calibrate --search")
    if set(found) != set(layers):
        odd = sorted(set(found) ^ set(layers))[0]
        raise RecipeError(f"the search was run on another model (layer {odd}); run sanawm calibrate --search on this checkpoint")
    return {name: found[name] for name in layers}


def counts(table: Mapping[str, LayerFormat]) -> dict[str, int]:
    """Number of layers of each format label, most frequent first."""
    labels = [layer_format.label for layer_format in table.values()]
    return {label: labels.count(label) for label in sorted(set(labels), key=lambda x: (-labels.count(x), x))}

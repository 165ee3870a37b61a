"""The quality report of a recipe: every measurement as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sanawm.config import WorldConfig
from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm_calibration.apply import fake_quantized, quantize_model
from sanawm_calibration.evaluate import Scores, compare, shared_copy
from sanawm_calibration.gates import Gate, layer_gates, model_gates
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.quantize import FakeQuantLinear
from sanawm_calibration.recipe import LayerTable, layer_table, load_recipe
from sanawm_calibration.roles import model_layers
from sanawm_calibration.sensitivity import output_sqnr
from sanawm_calibration.store import Calibration

CAVEAT = (
    "Everything here compares arithmetic with arithmetic on the checkpoint that was given: what people see (VBench, LPIPS), camera-pose error, "
    "drift over minutes and which layers are truly sensitive are properties of trained weights and cannot be known without them, so on random "
    "weights this report ranks recipes and finds mistakes, and says nothing of a video's quality."
)
FP8, OTHER_SEED = "fp8", "other seed"
# what is being done, steps done, steps in all
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerRow:
    """A quantized layer: its format, output SQNR in dB, bytes, and the largest share of its input range that the rollouts used."""

    name: str
    role: str
    tier: str
    block: int
    format: str
    sqnr: float
    nbytes: int
    range_used: float


@dataclass
class RecipeReport:
    """What a recipe measured against the reference, against FP8, and against another seed."""

    recipe: str
    description: str
    layers: list[LayerRow]
    velocity: dict[str, dict[str, float]]  # candidate -> timestep -> dB
    cosine: dict[str, list[float]]  # candidate -> chunk -> latent cosine from the reference's state
    free: dict[str, list[float]]  # candidate or other seed -> chunk -> latent SQNR of the free run, dB
    drift: dict[str, float]  # candidate or other seed -> dB a chunk
    camera: dict[str, float]  # candidate -> cosine
    nbytes: dict[str, int]  # bf16, fp8, nvfp4 (with scales and corrections) -> bytes of all weights
    gates: list[Gate]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]

    def to_json(self) -> dict[str, Any]:
        data = {k: v for k, v in vars(self).items() if k not in ("layers", "gates")}
        data["layers"] = [vars(row) for row in self.layers]
        data["gates"] = [vars(gate) | {"passed": gate.passed} for gate in self.gates]
        data |= {"passed": self.passed, "total_bytes": sum(self.nbytes.values()), "clipped": 0, "caveat": CAVEAT}
        return _finite(data)


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def candidate(model: SanaWM, table: LayerTable, calibration: Calibration, on_layer: Progress | None = None) -> SanaWM:
    """A fake-quantized copy of the linearized reference; what is not quantized shares the reference's tensors."""
    copied = shared_copy(model)
    return fake_quantized(copied, quantize_model(copied, table, calibration, progress=on_layer))


@torch.no_grad()
def make_report(
    model: SanaWM, calibration: Calibration, inputs: Sequence[ClipInputs], recipe_name: str, progress: Progress | None = None
) -> RecipeReport:
    """Measure a recipe on clips. The reference is linearized in place.

    Raises CalibrationError naming a layer that clips, and RecipeError for a recipe that does not fit.
    """
    linearize(model)
    world: WorldConfig = calibration.config
    recipe = load_recipe(recipe_name)
    table = layer_table(recipe, world.dit, calibration.found_table())
    found = candidate(model, table, calibration, progress)
    candidates = {recipe.name: found}
    if recipe.name != FP8:
        candidates[FP8] = candidate(model, layer_table(load_recipe(FP8), world.dit), calibration, progress)
    scores = compare(model, candidates, inputs, world, progress)
    rows = _rows(model, found, calibration)
    mine, fp8 = scores[recipe.name], scores[FP8]
    gates = layer_gates({row.name: (table[row.name].format, row.sqnr) for row in rows})
    gates += model_gates(mine.velocity_sqnr, mine.chunk_cosine, mine.camera_cosine, fp8.camera_cosine)
    return RecipeReport(
        recipe.name,
        recipe.description,
        rows,
        {name: scores[name].velocity_sqnr for name in candidates},
        {name: scores[name].chunk_cosine for name in candidates},
        {name: s.free_sqnr for name, s in scores.items()},
        {name: s.drift for name, s in scores.items()},
        {name: scores[name].camera_cosine for name in candidates},
        realised_bytes(found),
        gates,
        _facts(model, calibration, inputs, scores),
    )


def _facts(model: SanaWM, calibration: Calibration, inputs: Sequence[ClipInputs], scores: Mapping[str, Scores]) -> dict[str, Any]:
    return {
        "checkpoint": calibration.checkpoint,
        "model": calibration.config.name,
        "reference": str(model.dtype).removeprefix("torch."),
        "clips": [item.clip.name for item in inputs],
        "chunks": max(len(s.free_sqnr) for s in scores.values()),
        "versions": calibration.versions,
    }


def _rows(model: SanaWM, found: SanaWM, calibration: Calibration) -> list[LayerRow]:
    rows = []
    for name, layer in model_layers(model.config).items():
        quantized = found.get_submodule(name)
        if not isinstance(quantized, FakeQuantLinear):
            continue
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and layer.block is not None
        packed = quantized.packed
        # Measured before the sampled rows, which are calibration data, touch the peak.
        used = quantized.peak / packed.input_limit
        value = output_sqnr(linear, quantized, calibration.rows(layer))
        rows.append(LayerRow(name, layer.role.name, layer.tier, layer.block, packed.layer_format.label, value, packed.nbytes, used))
    return rows


def realised_bytes(found: SanaWM) -> dict[str, int]:
    """Bytes of every tensor of a fake-quantized model as it would be stored, by format; biases and corrections count with their layer."""
    total = {"nvfp4": 0, "fp8": 0, "bf16": 0}
    inside: set[int] = set()
    for module in found.modules():
        if isinstance(module, FakeQuantLinear):
            total[module.packed.layer_format.format] += module.packed.nbytes
            inside |= {id(t) for t in module.parameters()}
    total["bf16"] += sum(p.numel() * p.element_size() for p in found.parameters() if id(p) not in inside)
    return total

"""Search of a mixed-precision policy: every layer starts in the cheapest format and is promoted until the quality gates pass.

Noise of layers is taken to add up, which holds while it is small; every policy that is predicted to pass is measured, and where the sum was
wrong the prediction is scaled to what was measured and the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sanawm_calibration.cost import CostModel
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.gates import CAMERA_SHARE_OF_FP8, LAYER_SQNR, VELOCITY_SQNR
from sanawm_calibration.recipe import LayerFormat, LayerTable
from sanawm_calibration.roles import Layer, model_layers, quantizable
from sanawm_calibration.sensitivity import CAMERA, Noise, Sensitivity

# Measures a layer table: relative noise by column.
Measure = Callable[[LayerTable], Noise]


@dataclass(frozen=True)
class FrontierPoint:
    """A policy on the way from the cheapest to bfloat16.

    Bytes of weights, least seconds of products a chunk, the worst timestep's velocity SQNR in dB, and the camera-delta cosine, predicted unless
    `measured`. `promoted` is the layer that the step promoted, with its new format.
    """

    nbytes: float
    seconds: float
    velocity_sqnr: float
    camera_cosine: float
    measured: bool = False
    promoted: str = ""
    label: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class SearchResult:
    """The policy that was chosen, the frontier that led to it, and what measuring it gave."""

    target: str
    table: LayerTable
    limits: Noise
    measured: Noise
    frontier: list[FrontierPoint] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "layers": {name: layer_format.to_json() for name, layer_format in self.table.items()},
            "limits": self.limits,
            "measured": self.measured,
            "frontier": [point.to_json() for point in self.frontier],
        }


def noise_of_sqnr(decibels: float) -> float:
    return 10 ** (-decibels / 10)


def noise_of_cosine(cosine: float) -> float:
    """Relative noise, independent of the signal, that leaves a cosine."""
    return 1 / cosine**2 - 1


def cosine_of_noise(noise: float) -> float:
    return 1 / math.sqrt(1 + noise)


def limits(columns: Sequence[str], fp8: Noise) -> Noise:
    """The largest noise of each column that passes the gates; the camera column's depends on what FP8 everywhere reaches."""
    camera = noise_of_cosine(CAMERA_SHARE_OF_FP8 * cosine_of_noise(fp8[CAMERA]))
    return {column: camera if column == CAMERA else noise_of_sqnr(VELOCITY_SQNR) for column in columns}


class _Policy:
    """Levels of all layers on the ladder, with the sums that the greedy choice needs."""

    def __init__(self, sensitivity: Sensitivity, ladder: Sequence[LayerFormat], cost: CostModel) -> None:
        self.sensitivity, self.ladder, self.cost = sensitivity, ladder, cost
        self.layers: dict[str, Layer] = quantizable(cost.config.dit)
        self.level = dict.fromkeys(self.layers, 0)
        self.scale = dict.fromkeys(sensitivity.columns, 1.0)
        everything = {name: LayerFormat() for name in self.layers}
        self.whole_bytes, self.whole_seconds = cost.total(everything)
        for name in self.layers:
            # A format under its own layer gate is a mistake there, whatever the whole model says.
            while not self._layer_passes(name):
                self.level[name] += 1

    def _layer_passes(self, name: str) -> bool:
        layer_format = self.format(name)
        return layer_format.format == "bf16" or self.sensitivity.layer_sqnr[name][layer_format] >= LAYER_SQNR[layer_format.format]

    def format(self, name: str) -> LayerFormat:
        return self.ladder[self.level[name]]

    def table(self) -> LayerTable:
        found = dict.fromkeys(model_layers(self.cost.config.dit), LayerFormat())
        return found | {name: self.format(name) for name in self.layers}

    def noise_at(self, name: str, level: int) -> Noise:
        layer_format = self.ladder[level]
        return self.sensitivity.noise[name][layer_format] if layer_format.format != "bf16" else dict.fromkeys(self.scale, 0.0)

    def predicted(self) -> Noise:
        parts = [self.noise_at(name, level) for name, level in self.level.items()]
        return {column: self.scale[column] * sum(part[column] for part in parts) for column in self.scale}

    def promote(self, bounds: Noise) -> str | None:
        """Promote the layer that removes most noise, relative to the limits, for its cost; None where all are at the top."""
        now = self.predicted()
        # Columns that pass still count a little, so that the frontier goes on after the gates do.
        weight = {c: (1.0 if now[c] > bounds[c] else 0.01) * self.scale[c] / bounds[c] for c in bounds}
        best: tuple[float, str] | None = None
        for name, level in self.level.items():
            if level + 1 == len(self.ladder):
                continue
            here, there = self.noise_at(name, level), self.noise_at(name, level + 1)
            gain = sum(weight[c] * max(0.0, here[c] - there[c]) for c in weight)
            value = gain / self._price(name, level)
            if best is None or value > best[0]:
                best = (value, name)
        if best is None:
            return None
        name = best[1]
        self.level[name] += 1
        while not self._layer_passes(name):
            self.level[name] += 1
        return name

    def _price(self, name: str, level: int) -> float:
        layer = self.layers[name]
        here, there = self.ladder[level], self.ladder[level + 1]
        more_bytes = there.weight_bytes(layer) - here.weight_bytes(layer)
        more_seconds = max(0.0, self.cost.seconds(layer, there) - self.cost.seconds(layer, here))
        return more_bytes / self.whole_bytes + more_seconds / self.whole_seconds

    def point(self, noise: Noise, measured: bool, promoted: str = "", label: str = "") -> FrontierPoint:
        return frontier_point(self.cost, self.table(), noise, measured, promoted, label)


def frontier_point(
    cost: CostModel, table: Mapping[str, LayerFormat], noise: Noise, measured: bool, promoted: str = "", label: str = ""
) -> FrontierPoint:
    """A policy's place on the frontier."""
    nbytes, seconds = cost.total(table)
    worst = max(noise[c] for c in noise if c != CAMERA)
    sqnr = -10 * math.log10(worst) if worst else math.inf
    return FrontierPoint(nbytes, seconds, sqnr, cosine_of_noise(noise[CAMERA]), measured, promoted, label)


def greedy(sensitivity: Sensitivity, ladder: Sequence[LayerFormat], cost: CostModel, fp8: Noise, measure: Measure) -> SearchResult:
    """Promote until the measured policy passes every gate, then on to the end for the frontier's sake.

    `fp8` is the measured noise of FP8 in every quantizable layer. Raises CalibrationError where even the top of the ladder fails.
    """
    policy = _Policy(sensitivity, ladder, cost)
    bounds = limits(sensitivity.columns, fp8)
    frontier = [policy.point(policy.predicted(), False)]
    chosen: tuple[LayerTable, Noise] | None = None
    while True:
        predicted = policy.predicted()
        if chosen is None and all(predicted[c] <= bounds[c] for c in bounds):
            measured = measure(policy.table())
            if all(measured[c] <= bounds[c] for c in bounds):
                chosen = policy.table(), measured
                frontier.append(policy.point(measured, True, label="chosen"))
            else:
                for c in bounds:
                    if predicted[c] > 0:
                        policy.scale[c] *= measured[c] / predicted[c]
        name = policy.promote(bounds)
        if name is None:
            break
        frontier.append(policy.point(policy.predicted(), False, promoted=f"{name} -> {policy.format(name).label}"))
    if chosen is None:
        raise CalibrationError("no mix of formats passes the quality gates, not even bfloat16 everywhere; check the checkpoint and the clips")
    return SearchResult(cost.target, chosen[0], bounds, chosen[1], frontier)

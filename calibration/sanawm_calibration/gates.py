"""Quality gates: limits under which a recipe is not shipped.

They are where to start, set on synthetic weights; reset them when trained weights have been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sanawm_calibration.recipe import Format

# Output SQNR of a layer in dB; less is a mistake in the scales, not the format's doing.
LAYER_SQNR: dict[Format, float] = {"nvfp4": 16.0, "fp8": 25.0}
# SQNR of the velocity at every timestep, on the same inputs, in dB.
VELOCITY_SQNR = 15.0
# Cosine of a chunk's final latents with the reference's, from the reference's state.
LATENT_COSINE = 0.985
# Cosine of the change that a moved camera makes, relative to what FP8 reaches.
CAMERA_SHARE_OF_FP8 = 0.9
# SQNR of an exported graph against the fake-quantized model, in dB.
EXPORT_SQNR = 30.0


@dataclass(frozen=True)
class Gate:
    """A measured value and the limit it has to reach."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value >= self.limit


def layer_gates(sqnr: Mapping[str, tuple[Format, float]]) -> list[Gate]:
    """A gate for each layer: name -> (format, output SQNR)."""
    return [Gate(f"layer {name} ({layer_format})", value, LAYER_SQNR[layer_format]) for name, (layer_format, value) in sqnr.items()]


def model_gates(velocity: Mapping[str, float], cosines: list[float], camera: float, camera_fp8: float) -> list[Gate]:
    """Gates of the whole model: velocity SQNR by timestep, latent cosine by chunk, camera-delta cosine beside FP8's."""
    found = [Gate(f"velocity SQNR at {label} (dB)", value, VELOCITY_SQNR) for label, value in velocity.items()]
    found += [Gate(f"latent cosine of chunk {i}", value, LATENT_COSINE) for i, value in enumerate(cosines)]
    return [*found, Gate("camera-delta cosine", camera, CAMERA_SHARE_OF_FP8 * camera_fp8)]

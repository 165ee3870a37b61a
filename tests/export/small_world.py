"""A checkpoint of the smallest world with every mechanism, calibrated with made-up statistics, and its builds for TensorRT-RTX.

Run as a script it builds a bundle and prints its progress: `small_world.py CHECKPOINT CALIBRATION OUT CACHE`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sanawm.config import WorldConfig, tiny_config
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.synth import synthesize
from sanawm_calibration.roles import quantizable
from sanawm_calibration.store import Calibration, write
from sanawm_export.build import BuildRequest
from sanawm_export.tensorrt import build as build_module
from sanawm_export.tensorrt.build import TensorRTOptions, build_tensorrt
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.targets import resolve_target

# Plain rounding: searched scales take longer and change no graph.
RECIPE = """
description = "Every format in one model."
[[layers]]
tiers = ["A"]
format = "nvfp4"
[[layers]]
tiers = ["B"]
format = "fp8"
"""


def small(**changes: Any) -> WorldConfig:
    """One recurrent block and one attention block."""
    tiny = tiny_config()
    fields = {"depth": 2, "softmax_every": 2, "text_tokens": 8, "hidden": 64, "head_dim": 16, "height": 2, "width": 3, **changes}
    return replace(tiny, name="small", dit=replace(tiny.dit, **fields))


def made_up_calibration(world: WorldConfig, identity: dict[str, Any]) -> Calibration:
    """Statistics that no model produced: what matters here is that every layer has some."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in quantizable(world.dit).values():
        amax = 1 + 4 * torch.rand(layer.columns, generator=generator)
        rows = torch.randn(4, layer.columns, generator=generator).bfloat16()
        tensors[layer.source] = {"channel_amax": amax, "channel_mean": torch.zeros(layer.columns), "rows": rows}
    return Calibration(identity, world, [{"name": "made up"}], {"chunks": 0}, {}, {}, tensors)


def make(folder: Path) -> tuple[Path, Path, Path]:
    """Checkpoint, calibration file and recipe file in a new folder."""
    checkpoint = synthesize(folder / "checkpoint", small())
    identity = {"fingerprint": open_checkpoint(checkpoint).fingerprint(), "source": str(checkpoint)}
    write(made_up_calibration(open_checkpoint(checkpoint).world, identity), folder / "calibration.json")
    (folder / "everything.toml").write_text(RECIPE)
    return checkpoint, folder / "calibration.json", folder / "everything.toml"


def freeze_sources() -> None:
    """Let builds of this process take the package's sources for unchanged: tests may run while they are edited."""
    build_module.sources_digest = lambda: "frozen"  # type: ignore[assignment]


def build(checkpoint: Path, calibration: Path, precision: str, out: Path, cache: Path, target: str = "rtx5090", **options: Any) -> Bundle:
    """The bundle of a small checkpoint; `progress` and `overwrite` as for `build_tensorrt`, other options as in `TensorRTOptions`."""
    given = {name: options.pop(name) for name in ("progress", "overwrite") if name in options}
    request = BuildRequest(open_checkpoint(checkpoint), resolve_target(target), "tensorrt_rtx", precision)
    return build_tensorrt(request, out, options=TensorRTOptions(calibration=calibration, cache=cache, **options), **given)


if __name__ == "__main__":
    freeze_sources()
    paths = [Path(text) for text in sys.argv[1:]]
    build(*paths[:2], str(paths[2]), paths[3], paths[4], progress=lambda *event: print(*event, flush=True), overwrite=True)

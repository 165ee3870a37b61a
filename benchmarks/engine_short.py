"""Every program of a small CUDA bundle once or a few times: what compute-sanitizer watches.

    python benchmarks/engine_short.py build FOLDER
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/engine_short.py run FOLDER/bf16
    compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/engine_short.py run FOLDER/fp8

The model is small, but its two blocks are as wide as the official ones, so that no tile is held twice, and its kernels those that the official size
uses on Hopper. `run` imports neither torch nor Triton: a start (both encoders, the prompt's keys), then the first, the second and a steady chunk,
denoised, committed and decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from sanawm.config import DiTConfig, WorldConfig, tiny_config

CHUNKS = 3


def small_world() -> WorldConfig:
    """A GDN block and a softmax block of the official width, 192 x 320 pixels."""
    dit = DiTConfig(in_channels=64, depth=2, softmax_every=2, caption_channels=64, text_tokens=64, height=6, width=10)
    vae = dataclasses.replace(
        tiny_config().vae, latent_channels=64, encoder_widths=(64, 128, 128, 128), decoder_widths=(64, 128, 256),
    )  # fmt: skip
    return dataclasses.replace(tiny_config(), name="short", dit=dit, vae=vae)


def build(folder: Path, target: str, precisions: list[str]) -> None:
    """A bundle with weights in a file for each precision."""
    import engine_bundle  # beside this file; needs torch and Triton

    written: dict[bytes, Path] = {}
    for precision in precisions:
        made = engine_bundle.build(folder / f"{precision}-seed", small_world(), target, precision, seed=1)
        bundle = engine_bundle.stored(made, folder / precision, written)
        print(f"{bundle.root}: {len(bundle.manifest.files)} files", flush=True)


def run(bundle: Path) -> None:
    """A short stream. Raises SystemExit where frames are all alike, which no right run gives."""
    from sanawm.camera import actions_to_poses
    from sanawm_runtime.world import World

    with World.open(bundle) as world:
        picture = np.random.default_rng(0).integers(0, 256, (*world.image_size, 3), np.uint8)
        stream = world.start(picture, "a red bridge over a river")
        path = np.asarray(actions_to_poses("w-60,dw-60"), np.float64)
        start = 0
        for _ in range(CHUNKS):
            poses = path[start : start + stream.poses_needed]
            start += len(poses)
            chunk = stream.step(poses)
            if chunk.frames.std() == 0 or not np.isfinite(chunk.latents).all():
                raise SystemExit(f"chunk {chunk.index} of {bundle} is not what a model makes")
            print(f"chunk {chunk.index}: {len(chunk.frames)} frames", flush=True)
        stream.close()
    if loaded := {"torch", "triton"} & set(sys.modules):
        raise SystemExit(f"a run imports {', '.join(sorted(loaded))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build")
    make.add_argument("folder", type=Path)
    make.add_argument("--target", default="h200")
    make.add_argument("--precision", action="append", default=[])
    commands.add_parser("run").add_argument("bundle", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.folder, options.target, options.precision or ["bf16", "fp8"])
    else:
        run(options.bundle)


if __name__ == "__main__":
    main()

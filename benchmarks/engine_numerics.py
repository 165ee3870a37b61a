"""Final latents of the CUDA engine beside the torch model's, on the same weights, noise, text and camera; encoders and decoder too.

    python benchmarks/engine_numerics.py FOLDER/bf16 FOLDER/fp8 -o benchmarks/results/h200-numerics.json

The reference is the torch model in float32 with the weights that the checkpoint holds in bfloat16. Each engine's distance from it stands beside
that of the torch model in bfloat16. A bundle's clip is made twice, and both must be the same bytes. The bundles have synthetic weights of one seed;
encoders and decoder, which are alike in every precision, are compared on the first one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_parts  # beside this file
import numpy as np
import torch
from engine_torch import Weights
from numpy.typing import NDArray

from sanawm.bfloat16 import round_to
from sanawm.camera import CameraPacker, actions_to_poses, default_intrinsics
from sanawm.config import StreamConfig, WorldConfig
from sanawm.model.dit import SanaWM
from sanawm.model.sampler import stream
from sanawm.schedule import Chunk, chunk_grid, latent_frames
from sanawm_export.cuda.bench import Bench, Clip
from sanawm_export.cuda.bench_rows import commit, versions, write
from sanawm_export.cuda.synthetic import synthetic_seed
from sanawm_runtime.bundle import Bundle
from sanawm_runtime.bundle.manifest import utc_now
from sanawm_runtime.engines.cuda import CudaEngine

# Of the text's tokens; the rest is padding that the mask hides.
WORDS = 0.7
Inputs = dict[str, NDArray[np.float32]]


def inputs(world: WorldConfig, chunks: list[Chunk], seed: int) -> tuple[list[Inputs], NDArray[np.float32], NDArray[np.bool_]]:
    """What each chunk's programs take, the text's embedding, and its mask. Values that the engine stores in bfloat16 are rounded."""
    random, packer, dit = np.random.default_rng(seed), CameraPacker(world), world.dit
    intrinsics = default_intrinsics(world.image_width, world.image_height)
    path, found, start = actions_to_poses(f"w-{8 * chunks[-1].end},dw-{8 * chunks[-1].end}"), [], 0
    for chunk in chunks:
        end = start + CameraPacker.poses_needed(chunk.frames, chunk.index == 0)
        packed = packer.push(np.asarray(path[start:end], np.float64), np.tile(intrinsics, (end - start, 1)))
        latents = random.standard_normal((1, dit.in_channels, chunk.frames, dit.height, dit.width), np.float32)
        found.append({
            "camera_conditions": packed.camera_conditions, "chunk_plucker": packed.chunk_plucker, "latents": round_to(latents, "bfloat16"),
        })  # fmt: skip
        start = end
    text = round_to(random.standard_normal((1, dit.text_tokens, dit.caption_channels), np.float32), "bfloat16")
    return found, text, np.arange(dit.text_tokens)[None] < WORDS * dit.text_tokens


def common_seed(bundles: Sequence[Bundle]) -> int:
    """The seed of the synthetic checkpoint that the bundles' weights are of. Raises SystemExit where there is no such one."""
    sources = {bundle.manifest.checkpoint.source for bundle in bundles}
    seeds = {synthetic_seed(source) for source in sources}
    if len(sources) != 1 or None in seeds:
        raise SystemExit(f"expected bundles of one synthetic checkpoint, found {', '.join(sorted(sources))}")
    return seeds.pop() or 0


def on_engine(engine: CudaEngine, bundle: Bundle, frames: int, given: list[Inputs], text: NDArray, mask: NDArray) -> list[NDArray]:
    """Final latents of each chunk; raises SystemExit where a second clip differs in a byte."""
    bench = Bench(bundle, frames, engine, clips=1)
    clip = Clip(bench)
    engine.write(clip.text["text"], text)
    engine.write(clip.text["text_mask"], mask)
    engine.run("prompt_kv", clip.text)
    made = []
    for _ in range(2):
        clip.restart()
        found = []
        for chunk, values in zip(bench.chunks, given):
            clip.denoise(chunk, {**clip.inputs(chunk), **values})
            found.append(engine.read(clip.latents(chunk)))
        made.append(found)
    if any(not np.array_equal(a, b) for a, b in zip(*made)):
        raise SystemExit(f"{bundle.root}: two clips of the same inputs differ")
    return made[0]


@torch.no_grad()
def on_torch(
    made: SanaWM, config: StreamConfig, given: list[Inputs], text: NDArray, mask: NDArray, dtype: torch.dtype, device: str
) -> list[NDArray]:
    """Final latents of each chunk."""
    made = made.to(device, dtype)
    noise = torch.from_numpy(np.concatenate([values["latents"] for values in given], 2)).to(device, dtype)
    camera = torch.from_numpy(np.concatenate([values["camera_conditions"] for values in given], 1)).to(device)
    plucker = torch.from_numpy(np.concatenate([values["chunk_plucker"] for values in given], 2)).to(device)
    features = made.encode_text(torch.from_numpy(text).to(device), torch.from_numpy(mask).to(device))
    return [step.latents.float().cpu().numpy() for step in stream(made, noise, features, camera, plucker, config)]


def distances(chunks: list[Chunk], found: list[NDArray], want: list[NDArray]) -> list[float]:
    """Relative distance of each chunk's latents, without the given first frame."""
    result = []
    for chunk, a, b in zip(chunks, found, want):
        skip = int(chunk.start == 0)
        a, b = (x[:, :, skip:].astype(np.float64) for x in (a, b))
        result.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=73, help="clip length; 73: first, second and one steady chunk")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--device", default="cuda", help="of the torch model")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    opened = [Bundle.open(path) for path in options.bundles]
    world = opened[0].manifest.config
    weights = Weights(world, common_seed(opened))
    clock = Clock()
    chunks = chunk_grid(latent_frames(options.frames), world.stream.chunk_frames)
    given, text, mask = inputs(world, chunks, options.seed)
    more = engine_parts.inputs(world, engine_parts.prompt_tokens(opened[0]), options.seed)
    latents, parts = [], {}
    for bundle in opened:
        engine = CudaEngine(bundle)
        latents.append(on_engine(engine, bundle, options.frames, given, text, mask))
        parts = parts or engine_parts.on_engine(engine, bundle, more)
        engine.close()
        clock.tick(f"{bundle.manifest.precision.recipe} engine")
    made = weights.transformer()
    clock.tick("weights of the torch model")
    half = on_torch(made, world.stream, given, text, mask, torch.bfloat16, options.device)
    want = on_torch(made, world.stream, given, text, mask, torch.float32, options.device)
    del made
    clock.tick("torch, bfloat16 and float32")
    parts_half, parts_want = engine_parts.on_torch(weights, more, options.device)
    weights.close()
    clock.tick("torch, encoders and decoder")
    rows, near = [], distances(chunks, half, want)
    for bundle, found in zip(opened, latents):
        recipe = bundle.manifest.precision.recipe
        cases = [f"engine.numerics.chunk{chunk.index}.{recipe}" for chunk in chunks]
        rows += [row(case, *pair, LATENTS) for case, *pair in zip(cases, distances(chunks, found, want), near)]
    found, near = engine_parts.distances(parts, parts_want), engine_parts.distances(parts_half, parts_want)
    rows += [row(f"engine.numerics.{name}.bf16", value, near[name], PARTS[name]) for name, value in found.items()]
    for found_row in rows:
        print(f"{found_row['case']}: {found_row['value']:.5f}, torch in bfloat16 {found_row['peer_value']:.5f}", flush=True)
    if options.output:
        write(options.output, {**environment(), "rows": rows})


class Clock:
    """Prints how long each stage took."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def tick(self, stage: str) -> None:
        now = time.perf_counter()
        print(f"{stage}: {now - self._begin:.1f} s", flush=True)
        self._begin = now


HALF, FROM_FLOAT32 = "torch bfloat16", "relative distance from float32"
LATENTS = "final latents of a chunk after four steps; a second clip gave the same bytes"
PARTS = {
    "text_encoder": "embeddings of a random prompt's real tokens",
    "image_encoder": "latent of a random picture",
    "decode_first": "levels of the first frame from the middle grey",
    "decode": "levels of the eight frames of the second latent frame from the middle grey",
}


def row(
    case: str, value: float, peer_value: float | None, includes: str, peer: str | None = HALF, metric: str = FROM_FLOAT32, unit: str = "1"
) -> dict[str, Any]:
    """A row of a results file: a distance and its peer's."""
    return {
        "case": case, "metric": metric, "value": value, "unit": unit, "min": None, "max": None, "n": 1, "floor": None,
        "peer": peer, "peer_value": peer_value, "includes": includes,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Hardware, driver, versions, commit and date, as a results file has them."""
    from sanawm_runtime.engines._cuda_device import Gpu

    device = Gpu()
    found = {"hardware": device.name, "driver": device.driver_version, "versions": versions(), "commit": commit(), "date": utc_now()[:10],
             "notes": "random weights, noise and text; a camera that moves ahead and turns"}  # fmt: skip
    device.close()
    return found


if __name__ == "__main__":
    sys.exit(main())

"""benchmarks/engine_numerics.py on a small world: three chunks, every launch run by Triton's interpreter, beside the torch model's sampler.

Prints, as JSON, the relative distance of each chunk's latents and of what encoders and decoder make. Runs in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import cuda_worlds
import engine_numerics
import engine_parts
import torch
from cuda_clip_interpreted import SEED, Clip
from engine_torch import Weights

from sanawm.schedule import chunk_grid, latent_frames
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines.cuda import CudaEngine

FRAMES = 49


def main() -> None:
    world = cuda_worlds.small_world()
    clip = Clip(Path(tempfile.mkdtemp()) / "bundle", world)
    chunks = chunk_grid(latent_frames(FRAMES), world.stream.chunk_frames)
    given, text, mask = engine_numerics.inputs(world, chunks, 0)
    more = engine_parts.inputs(world, engine_parts.prompt_tokens(clip.bundle), 0)
    engine = CudaEngine(clip.bundle, Gpu(driver=clip.driver))
    found = engine_numerics.on_engine(engine, clip.bundle, FRAMES, given, text, mask)
    parts = engine_parts.on_engine(engine, clip.bundle, more)
    weights = Weights(world, SEED, torch.float32)
    want = engine_numerics.on_torch(weights.transformer(), world.stream, given, text, mask, torch.float32, "cpu")
    _, parts_want = engine_parts.on_torch(weights, more, "cpu")
    weights.close()
    errors = engine_numerics.distances(chunks, found, want)
    print(json.dumps({"kinds": [chunk.kind for chunk in chunks], "errors": errors, "parts": engine_parts.distances(parts, parts_want)}))


if __name__ == "__main__":
    main()

"""A small random world for calibration tests: two blocks of each kind's mechanism, run without encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sanawm.camera import camera_conditions, chunk_plucker, default_intrinsics, relative_to_first
from sanawm.config import WorldConfig, tiny_config
from sanawm.keys import dit_tensors
from sanawm.model.checkpoint.synth import synth_tensor
from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm_calibration import collect, store
from sanawm_calibration.clips import Clip
from sanawm_calibration.generated import MOTIONS, motion_poses
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.store import Calibration

torch.set_num_threads(1)


def small_world(hidden: int = 128, depth: int = 2) -> WorldConfig:
    tiny = tiny_config()
    return replace(tiny, name="small", dit=replace(tiny.dit, hidden=hidden, depth=depth, softmax_every=2, height=3, width=4))


def random_model(world: WorldConfig, seed: int = 2) -> SanaWM:
    with torch.device("meta"):
        model = SanaWM(world.dit)
    state = {name: torch.from_numpy(synth_tensor(name, info.shape, seed)) for name, info in dit_tensors(world.dit).items()}
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=True, assign=True)
    return linearize(model.eval().requires_grad_(False))


def random_inputs(world: WorldConfig, motion: int, chunks: int = 3) -> ClipInputs:
    """A clip's inputs with random text and first latent, and the camera of one of the generated motions."""
    generator = torch.Generator().manual_seed(motion)
    dit = world.dit
    poses = motion_poses(MOTIONS[motion], 24 * chunks + 1)
    clip = Clip(f"clip-{motion}", "a street", lambda: np.zeros((8, 8, 3), np.uint8), poses, None, 1000 + motion, MOTIONS[motion].name)
    rows = np.repeat(default_intrinsics(world.image_width, world.image_height)[None], len(poses), 0)
    relative = relative_to_first(poses)
    return ClipInputs(
        clip,
        torch.randn(1, dit.in_channels, 1, dit.height, dit.width, generator=generator),
        torch.randn(1, dit.text_tokens, dit.caption_channels, generator=generator),
        torch.arange(dit.text_tokens)[None] < 12,
        torch.from_numpy(camera_conditions(relative, rows, world)),
        torch.from_numpy(chunk_plucker(relative, rows, world)),
    )


@pytest.fixture(scope="session")
def world() -> WorldConfig:
    return small_world()


@pytest.fixture(scope="session")
def model(world: WorldConfig) -> SanaWM:
    return random_model(world)


@pytest.fixture(scope="session")
def inputs(world: WorldConfig) -> list[ClipInputs]:
    return [random_inputs(world, motion) for motion in (1, 4, 6)]


@pytest.fixture(scope="session")
def calibration(world: WorldConfig, model: SanaWM, inputs: list[ClipInputs], tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder: Path = tmp_path_factory.mktemp("clips")
    shards = collect.collect(model, inputs, world.stream, folder, {"test": 1}, rows=96)
    clips = [item.clip.describe() for item in inputs]
    return store.build(shards, world, checkpoint={"source": "random", "fingerprint": "0"}, clips=clips, settings={})

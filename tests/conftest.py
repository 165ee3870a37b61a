"""What tests of several components share: where kernels run, a random tiny checkpoint, the bundle built from it, and random transformers with inputs.

Kernels run in Triton's interpreter, or with `-m gpu` on a GPU. Triton decides at a kernel's definition whether to interpret it, so the choice is made
here, before any test module is imported. Tests of the compiler run it in a process of their own, without the interpreter.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sanawm.config import DiTConfig, TextConfig, VAEConfig, WorldConfig

# Read when torch is first imported. Tensors here are small, and waiting for a second thread takes longer than the work it takes over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import torch

    from sanawm.model.dit import SanaWM, TextFeatures
    from sanawm_runtime import World


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and processes that tests start and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: runs compiled kernels on a CUDA device; select with -m gpu")
    if config.option.markexpr == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]


@dataclass(frozen=True)
class Clip:
    """Inputs of a clip of T latent frames: latents (1, C, T, h, w), text (1, L, E), mask (1, L), camera (1, T, 20), plucker (1, 48, T, h, w)."""

    latents: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    camera: torch.Tensor
    plucker: torch.Tensor

    def features(self, model: SanaWM) -> TextFeatures:
        return model.encode_text(self.text, self.mask)


def camera_path(frames: int, seed: int) -> np.ndarray:
    """A smooth path (F, 4, 4) that turns and moves about 0.05 units a frame."""
    rng = np.random.default_rng(seed)
    speed = rng.normal(0, 0.03, 3)
    turn = rng.normal(0, 0.01, 3)
    pose, path = np.eye(4), []
    for _ in range(frames):
        path.append(pose.copy())
        x, y, z = turn + rng.normal(0, 0.002, 3)
        spin = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        # Cayley's map of a skew matrix is a rotation.
        rotation = np.linalg.solve(np.eye(3) - spin / 2, np.eye(3) + spin / 2)
        pose = pose.copy()
        pose[:3, 3] += pose[:3, :3] @ speed
        pose[:3, :3] = pose[:3, :3] @ rotation
    return np.stack(path)


def _world(config: DiTConfig) -> WorldConfig:
    vae, text = replace(VAEConfig(), latent_channels=config.in_channels), replace(TextConfig(), hidden=config.caption_channels)
    return WorldConfig(name="test", dit=config, vae=vae, text=text)


def _make_clip(config: DiTConfig, frames: int, seed: int = 0, dtype: torch.dtype | None = None) -> Clip:
    import torch

    from sanawm.camera import camera_conditions, chunk_plucker, relative_to_first

    world = _world(config)
    rng = np.random.default_rng(seed)
    path = relative_to_first(camera_path(8 * (frames - 1) + 1, seed))
    focal = world.image_width * rng.uniform(0.6, 1.1)
    intrinsics = np.array([focal, focal * 1.05, world.image_width / 2, world.image_height / 2])
    mask = np.arange(config.text_tokens) < rng.integers(1, config.text_tokens + 1)
    values = (
        rng.standard_normal((1, config.in_channels, frames, config.height, config.width)),
        rng.standard_normal((1, config.text_tokens, config.caption_channels)),
        camera_conditions(path, intrinsics, world),
        chunk_plucker(path, intrinsics, world),
    )
    latents, text, camera, plucker = (torch.from_numpy(v).to(dtype or torch.float32) for v in values)
    return Clip(latents, text, torch.from_numpy(mask)[None], camera, plucker)


def _make_model(config: DiTConfig, seed: int = 0, dtype: torch.dtype | None = None) -> SanaWM:
    import torch

    from sanawm.keys import dit_tensors
    from sanawm.model.checkpoint.values import synth_tensor
    from sanawm.model.dit import SanaWM

    with torch.device("meta"):
        model = SanaWM(config)
    state = {name: torch.from_numpy(synth_tensor(name, info.shape, seed)) for name, info in dit_tensors(config).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(dtype or torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """make_clip(config, frames, seed=0, dtype=float32): random inputs along a real camera path."""
    return _make_clip


@pytest.fixture(scope="session")
def make_model() -> Callable[..., SanaWM]:
    """make_model(config, seed=0, dtype=float32): a transformer none of whose tensors is zero."""
    return _make_model


@pytest.fixture(scope="session")
def make_path() -> Callable[[int, int], np.ndarray]:
    """make_path(frames, seed): poses (F, 4, 4) of a smooth path."""
    return camera_path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the tiny preset in the streaming layout."""
    from sanawm.model.checkpoint.synth import synthesize

    return synthesize(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The fp32 bundle of the tiny checkpoint for ONNX Runtime. Building it takes about a minute; do not modify it, copy what you damage."""
    from sanawm.model.checkpoint import open_checkpoint
    from sanawm_export.build import BuildRequest, build_onnxruntime
    from sanawm_runtime.targets import resolve_target

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    request: Any = BuildRequest(open_checkpoint(tiny_checkpoint), resolve_target("cpu"), "onnxruntime", "fp32")
    build_onnxruntime(request, out)
    return out


@pytest.fixture(scope="session")
def tiny_world(tiny_bundle: Path) -> Iterator[World]:
    """The tiny bundle opened; streams on it run in turn."""
    from sanawm_runtime import World

    with World.open(tiny_bundle) as world:
        yield world

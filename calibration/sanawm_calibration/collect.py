"""Self-rollouts of the distilled student with statistics of every quantizable layer's input.

Each clip's statistics are one file, written when the clip is done, so an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sanawm.config import StreamConfig
from sanawm.model.dit import SanaWM
from sanawm.model.linearize import linearize
from sanawm.model.sampler import stream
from sanawm.schedule import chunk_grid
from sanawm_calibration.errors import CalibrationError
from sanawm_calibration.inputs import ClipInputs
from sanawm_calibration.roles import Layer, quantizable
from sanawm_calibration.statistics import SourceStatistics, restore

# Label of the clean pass; denoising steps are labelled by their timestep.
CLEAN = "clean"
# clip name, clips done, clips in all, chunk done, chunks of the clip
Progress = Callable[[str, int, int, int, int], None]


@dataclass(frozen=True)
class Shard:
    """What one clip contributed: statistics by source, and how often each layer ran."""

    clip: str
    sources: dict[str, SourceStatistics]
    calls: dict[str, int]


class Recorder:
    """Hooks on a linearized transformer that feed statistics of layer inputs.

    What is not finite is found at the end of each evaluation, for all its layers at once: asking layer by layer would have a GPU wait.
    """

    def __init__(self, model: SanaWM, layers: dict[str, Layer], rows: int, seed: int, clip: str) -> None:
        self.sources: dict[str, SourceStatistics] = {}
        self.calls = dict.fromkeys(layers, 0)
        self._model, self._layers, self._rows, self._seed, self._clip = model, layers, rows, seed, clip
        self._label = ""
        # The tensor that each source was last seen as: layers of one source are handed the same object.
        self._seen: dict[str, Tensor] = {}
        # (layer, label, largest magnitude of its input) since the last check.
        self._unchecked: list[tuple[str, str, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are in place inside the block."""
        handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        handles.append(self._model.register_forward_hook(lambda module, args, out: self.check()))
        for name, layer in self._layers.items():
            handles.append(self._model.get_submodule(name).register_forward_pre_hook(self._hook(name, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The clip's first frame always sees timestep 0: the largest of the row is the step's.
        self._label = CLEAN if kwargs.get("commit") else str(int(args[1].max()))
        self._seen.clear()

    def _hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            self.calls[name] += 1
            if self._seen.get(layer.source) is x:
                return
            self._seen[layer.source] = x
            statistics = self.sources.get(layer.source)
            if statistics is None:
                seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{layer.source}".encode()).digest()[:7], "big")
                statistics = self.sources[layer.source] = SourceStatistics(x.shape[-1], self._rows, seed, x.device)
            label = self._label if layer.role.program == "forward" else layer.role.program
            self._unchecked.append((name, label, statistics.add(x, label)))

        return record

    def check(self) -> None:
        """Raise CalibrationError naming the first layer whose input was not finite since the last call."""
        if not self._unchecked:
            return
        finite = torch.isfinite(torch.stack([largest for _, _, largest in self._unchecked])).tolist()
        for (name, label, _), is_finite in zip(self._unchecked, finite):
            if not is_finite:
                raise CalibrationError(
                    f"{name}: its input has an infinity or NaN at {label} in clip {self._clip}; "
                    "check the checkpoint, or run in bfloat16 instead of float16"
                )
        self._unchecked.clear()


def check_length(inputs: Sequence[ClipInputs], config: StreamConfig) -> None:
    """Raise CalibrationError unless some clip reaches the steady attention window, sink and previous chunk."""
    longest = max(inputs, key=lambda i: i.latent_frames)
    chunks = chunk_grid(longest.latent_frames, config.chunk_frames)
    if not any(chunk.kind == "steady" for chunk in chunks):
        raise CalibrationError(
            f"the calibration set never reaches the steady window: its longest clip, {longest.clip.name}, has {len(chunks)} chunks "
            f"({longest.clip.frames} frames) and the window is steady from chunk 3 on; give at least one clip of "
            f"{config.chunk_frames * 8 * 3 + 1} frames"
        )


@torch.no_grad()
def collect_clip(
    model: SanaWM, inputs: ClipInputs, config: StreamConfig, rows: int, on_chunk: Callable[[int, int], None] | None = None
) -> Shard:
    """Roll out one clip with the model's own sampler and record; the model is linearized in place, the statistics come to the CPU."""
    linearize(model)
    device = next(model.parameters()).device
    recorder = Recorder(model, quantizable(model.config), rows, inputs.clip.seed, inputs.clip.name)
    total = len(chunk_grid(inputs.latent_frames, config.chunk_frames))
    with recorder.recording():
        text = model.encode_text(inputs.text.to(device), inputs.text_mask.to(device))
        noise = inputs.noise().to(device, model.dtype)
        for step in stream(model, noise, text, inputs.camera.to(device), inputs.plucker.to(device), config):
            if on_chunk:
                on_chunk(step.chunk.index + 1, total)
    recorder.check()
    return Shard(inputs.clip.name, {name: restore(source.tensors()) for name, source in recorder.sources.items()}, recorder.calls)


def collect(
    model: SanaWM,
    inputs: Sequence[ClipInputs],
    config: StreamConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    rows: int = 128,
    progress: Progress | None = None,
) -> list[Shard]:
    """Statistics of all clips, computed or, where `folder` has them from an earlier run of the same `identity`, read.

    `identity` says what the statistics depend on besides the clip: checkpoint, dtype, sampler. `rows` is the size of the sample of input
    rows kept for each source over all clips. Raises CalibrationError for values that are not finite and for a set that is too short.
    """
    check_length(inputs, config)
    folder.mkdir(parents=True, exist_ok=True)
    share = -(-rows // len(inputs))
    shards = []
    for number, item in enumerate(inputs):
        key = json.dumps({**identity, "clip": item.clip.digest(), "frames": item.clip.frames, "rows": share}, sort_keys=True)
        path = folder / f"{item.clip.name.replace(os.sep, '_')}.safetensors"
        shard = read_shard(path, key)
        if shard is None:

            def on_chunk(chunk: int, chunks: int, name: str = item.clip.name, done: int = number) -> None:
                if progress:
                    progress(name, done, len(inputs), chunk, chunks)

            shard = collect_clip(model, item, config, share, on_chunk)
            write_shard(path, shard, key)
        elif progress:
            progress(item.clip.name, number, len(inputs), 1, 1)
        shards.append(shard)
    return shards


def write_shard(path: Path, shard: Shard, key: str) -> None:
    """Write a clip's statistics; the file appears only when it is complete."""
    tensors = {f"{source}:{name}": t for source, s in shard.sources.items() for name, t in s.tensors().items()}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, {"key": key, "clip": shard.clip, "calls": json.dumps(shard.calls)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_shard(path: Path, key: str) -> Shard | None:
    """A clip's statistics, or None where there are none, of another key, or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            parts: dict[str, dict[str, Tensor]] = {}
            for full in file.keys():  # noqa: SIM118 (not a mapping)
                source, _, name = full.partition(":")
                parts.setdefault(source, {})[name] = file.get_tensor(full)
    except SafetensorError:
        return None
    return Shard(metadata["clip"], {source: restore(part) for source, part in parts.items()}, json.loads(metadata["calls"]))

"""A whole clip from a bundle into files: video, latents, timing, pictures."""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.camera import actions_to_poses, fit_length, load_poses
from sanawm.errors import CameraError, InputError
from sanawm.schedule import pixel_frames
from sanawm_runtime.chunk import Chunk
from sanawm_runtime.stream import AtEnd
from sanawm_runtime.video import VideoWriter, open_writer
from sanawm_runtime.world import ImageSource, IntrinsicsSource, World

# chunks done, chunks in all, the chunk just finished
Progress = Callable[[int, int, Chunk], None]


@dataclass(frozen=True)
class ClipRequest:
    """What to generate.

    Exactly one of `camera` (a pose file) and `action` (an action string). `frames` must be a length the bundle can make; without it the
    camera path is used as far as it reaches. `at_end` says what happens where the model's time axis ends, see `Stream`.
    """

    image: ImageSource
    prompt: str
    camera: str | os.PathLike[str] | None = None
    action: str | None = None
    intrinsics: IntrinsicsSource | None = None
    fov_degrees: float | None = None
    frames: int | None = None
    seed: int = 42
    codec: str = "auto"
    at_end: AtEnd = "stop"


@dataclass
class ClipReport:
    """What was generated: where, how much, and the time of every stage in seconds."""

    outputs: list[str]
    frames: int
    fps: int
    seed: int
    open_s: float
    start_s: float
    first_frame_s: float
    total_s: float
    chunks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def clip_frames(world: World, available: int, asked: int | None) -> int:
    """Pixel frames to generate: `asked`, or the most that `available` poses allow. Raises InputError or CameraError for lengths that do not fit."""
    first = pixel_frames(world.geometry.first_frames)
    step = world.config.stream.chunk_frames * world.config.vae.temporal_stride
    if asked is None:
        if available < first:
            raise CameraError(f"expected a camera path of at least {first} poses, found {available}; make it longer")
        return first + (available - first) // step * step
    if asked < first or (asked - first) % step:
        lower = max(first, first + (asked - first) // step * step)
        raise InputError(f"this bundle makes {first} + {step}k frames, found --frames {asked}; use {lower} or {lower + step}")
    return asked


def camera_path(request: ClipRequest) -> tuple[NDArray[np.float64], str]:
    """The request's camera path (F, 4, 4) and what it came from. Raises CameraError."""
    if (request.camera is None) == (request.action is None):
        raise CameraError("expected a camera path either as a pose file (--camera) or as actions (--action); give one of them")
    if request.camera is not None:
        return load_poses(request.camera), os.fspath(request.camera)
    assert request.action is not None
    return np.asarray(actions_to_poses(request.action), np.float64), "the action string"


class _Behind:
    """Writes chunks while the next ones are generated, in order, with up to AHEAD of them under way.

    `first_at` is when the first chunk was written.
    """

    AHEAD = 4

    def __init__(self, writers: Sequence[VideoWriter]) -> None:
        self._writers = writers
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sanawm-writer")
        self._begun: deque[concurrent.futures.Future[None]] = deque()
        self._failed = False
        self.first_at = 0.0

    def append(self, chunk: Chunk) -> float:
        """Give a chunk to the writers; the seconds that it waited. Raises what an earlier chunk raised."""
        begin = time.perf_counter()
        self._wait(self.AHEAD - 1)
        try:
            finish = [writer.begin(chunk.frames if writer.takes == "frames" else chunk.latents[0]) for writer in self._writers]
        except (ValueError, RuntimeError):
            self._wait()  # a writer that failed closes itself: say why
            raise
        self._begun.append(self._thread.submit(self._write, finish))
        return time.perf_counter() - begin

    def _write(self, finish: Sequence[Callable[[], None]]) -> None:
        if self._failed:
            return
        self._failed = True  # until the last writer is done: what follows a gap is not written
        for write in finish:
            write()
        self._failed = False
        self.first_at = self.first_at or time.perf_counter()

    def _wait(self, left: int = 0) -> None:
        while len(self._begun) > left or (self._begun and self._begun[0].done()):
            self._begun.popleft().result()

    def wait(self) -> None:
        """Wait for every chunk. Raises what the first of them raised."""
        self._wait()

    def stop(self) -> None:
        """Wait until the chunks that were given are written, or one of them failed."""
        self._thread.shutdown()


def generate_clip(
    world: World, request: ClipRequest, outputs: Sequence[str | os.PathLike[str]], *, opened_s: float = 0.0, progress: Progress | None = None
) -> tuple[ClipReport, list[NDArray[np.uint8]], NDArray[np.float64], NDArray[np.float64]]:
    """Stream a clip into `outputs` (.mp4 that grows, .npy latents, or a directory of PNGs).

    Returns the report, one frame a chunk for a contact sheet, the camera path (F, 4, 4) and the intrinsics (4,) of the model's frame. Inputs
    are checked before anything is written. Raises UserError's subclasses.
    """
    begin = time.perf_counter()
    path, source = camera_path(request)
    frames = clip_frames(world, len(path), request.frames)
    most = pixel_frames(world.config.dit.rope_frames)
    if request.at_end == "stop" and frames > most:
        raise InputError(f"the model's time axis ends after {most} frames, and {frames} are asked for; ask for fewer, or use --at-end continue")
    path = fit_length(path, frames, "trim", source)
    height, width = world.image_size
    fps = world.config.stream.fps
    pixels, geometry = world.prepare_image(request.image)
    rows = world.input_intrinsics(request.intrinsics, geometry, frames, request.fov_degrees)
    stream = world.start_prepared(pixels, request.prompt, rows, seed=request.seed, at_end=request.at_end)
    report = ClipReport([os.fspath(o) for o in outputs], frames, fps, request.seed, opened_s, time.perf_counter() - begin, 0.0, 0.0)
    total = 1 + (frames - stream.poses_needed) // (world.config.stream.chunk_frames * world.config.vae.temporal_stride)
    writers: list[Any] = []
    behind = _Behind(writers)
    shown: list[NDArray[np.uint8]] = []
    try:
        writers += [open_writer(o, fps=fps, height=height, width=width, codec=request.codec) for o in outputs]
        for chunk in stream.generate(path):
            seconds = chunk.seconds | {"write": behind.append(chunk)}
            report.chunks.append({"index": chunk.index, "frames": len(chunk.frames), "stages": seconds})
            shown += [chunk.frames[0]] if chunk.index == 0 else []
            shown.append(chunk.frames[-1])
            if progress:
                progress(chunk.index + 1, total, chunk)
        behind.wait()
    except BaseException as error:
        behind.stop()
        for writer in writers:
            writer.__exit__(type(error), error, error.__traceback__)
        raise
    behind.stop()
    for writer in writers:
        writer.close()
    report.total_s = time.perf_counter() - begin
    report.first_frame_s = behind.first_at - begin
    return report, shown, path, rows[0]


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_pictures(
    stem: Path, report: ClipReport, shown: list[NDArray[np.uint8]], path: NDArray[np.float64], intrinsics: NDArray[np.float64], world: World
) -> list[Path]:
    """Contact sheet, camera path and timeline as PNGs beside the video, named after it."""
    from sanawm_runtime.camera_plot import camera_path_plot
    from sanawm_runtime.pictures import contact_sheet, save_picture, timeline_plot

    ends = np.cumsum([c["frames"] for c in report.chunks])
    indices = [0, *(int(e) - 1 for e in ends)]
    keep = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), 12)).astype(int))
    captions = [f"frame {indices[i]}, {indices[i] / report.fps:.1f} s" for i in keep]
    pictures = {
        "sheet": contact_sheet([shown[i] for i in keep], min(4, len(keep)), captions, title="Frames"),
        "path": camera_path_plot(path, intrinsics, fps=report.fps, image_width=world.image_size[1]),
        "timeline": timeline_plot({"fps": report.fps, "chunks": report.chunks, "first_frame_s": report.first_frame_s}),
    }
    written = []
    for name, picture in pictures.items():
        written.append(stem.with_name(f"{stem.name}.{name}.png"))
        save_picture(picture, written[-1])
    return written

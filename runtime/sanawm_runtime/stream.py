"""One running stream: poses or held keys in, frames out, chunk by chunk."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.camera import DEFAULT_SCHEME, ActionIntegrator, ActionScheme, CameraPacker, to_model_range
from sanawm_runtime.chunk import Chunk, chunk_noise
from sanawm_runtime.engines.base import Buffer
from sanawm_runtime.errors import CameraError, Cancelled, EngineError, InputError, StreamClosed, StreamEnded
from sanawm_runtime.rollout import Monitor, Progress, Rollout

if TYPE_CHECKING:
    from sanawm_runtime.world import World

__all__ = ["AtEnd", "Chunk", "Keys", "Stream", "chunk_noise"]

AtEnd = Literal["stop", "continue"]
# A string of keys held all along; one string for each pose's frame; or a function of the number of frames that returns these.
Keys = str | Sequence[str] | Callable[[int], Sequence[str]]


class Stream:
    """A stream in progress, made by `World.start`. Memory and time of a chunk are constant however long it runs.

    Several streams share a world's engine and may be driven from several threads; each chunk is one turn at the engine, first come, first
    served. One stream is driven by one thread at a time; `cancel` alone may be called from another. `camera` is the integrator that held
    keys move.

    The model knows 1024 latent frames of time (8185 frames, 8.5 minutes). What then: with `at_end` "stop" the last chunk is marked, and a
    further step raises StreamEnded; with "continue" the time axis begins anew from the last frame, which the model then knows as its first
    and only memory, so that places seen before may look different when visited again.
    """

    def __init__(
        self,
        world: World,
        text: dict[str, Buffer],
        first_latent: NDArray[np.float32],
        first_frame: NDArray[np.uint8],
        intrinsics: NDArray[np.float64],
        seed: int,
        *,
        scheme: str | ActionScheme = DEFAULT_SCHEME,
        at_end: AtEnd = "stop",
        on_progress: Progress | None = None,
    ) -> None:
        if at_end not in ("stop", "continue"):
            raise InputError(f"expected at_end 'stop' or 'continue', found {at_end!r}")
        self.world = world
        self.first_frame = first_frame
        self.seed = checked_seed(seed)
        self.at_end = at_end
        self.on_progress = on_progress
        self.camera = ActionIntegrator(scheme)
        self.chunks_done = 0
        self.frames_done = 0
        self.runs_done = 0
        self._first_latent = first_latent
        self._intrinsics = intrinsics
        self._cancel = threading.Event()
        self._failure: BaseException | None = None
        self._last: tuple[NDArray[np.uint8], NDArray[np.float64]] | None = None
        self._rollout: Rollout | None = Rollout(world, text)
        self._rollout.begin(first_latent)

    @property
    def poses_needed(self) -> int:
        """Poses the next chunk takes, one a pixel frame: 25 for the first chunk, 24 later (with the default chunk grid)."""
        rollout = self._open()
        if rollout.has_room:
            return rollout.poses_needed
        # A run that begins anew has the pose of its first frame already.
        return CameraPacker.poses_needed(self.world.geometry.first_frames, True) - 1

    @property
    def ended(self) -> bool:
        """Whether the next step raises StreamEnded."""
        return self.at_end == "stop" and not self._open().has_room

    @property
    def closed(self) -> bool:
        return self._rollout is None or self.world.closed

    def step(self, poses: ArrayLike) -> Chunk:
        """Generate the next chunk along `poses`.

        poses (P, 4, 4) camera-to-world in any fixed world axes (OpenCV camera axes), P = `poses_needed`; the stream's first pose becomes the
        origin. Raises CameraError and Cancelled, which leave the stream as it was; StreamEnded; and EngineError, after which only `reset`
        and `close` are of use.
        """
        given = np.array(poses, np.float64)
        return self._step(lambda count: given)

    def hold(self, keys: Keys, integrator: ActionIntegrator | None = None) -> Chunk:
        """Generate the next chunk with keys held (a string such as "wd", "" to rest), moving `camera`, or `integrator`, along.

        A function is called when it is this stream's turn at the engine, so that the keys held then count. Raises as `step` does, and
        CameraError for an unknown key.
        """
        camera = integrator or self.camera
        moved = copy.copy(camera)

        def move(count: int) -> NDArray[np.float64]:
            poses = [moved.pose.copy()] if self.chunks_done == 0 else []
            frames = count - len(poses)
            held = keys(frames) if callable(keys) else keys
            each = [held] * frames if isinstance(held, str) else list(held)
            if len(each) != frames:
                raise CameraError(f"chunk {self.chunks_done} takes the keys of {frames} frames, found {len(each)}; give one string a frame")
            return np.stack(poses + [moved.step(names) for names in each])

        chunk = self._step(move)
        vars(camera).update(vars(moved))
        return chunk

    def generate(self, poses: ArrayLike) -> Iterator[Chunk]:
        """Generate along a whole trajectory, one chunk at a time.

        poses (F, 4, 4) with F = the next `poses_needed` plus a multiple of the later ones'.
        """
        path = np.asarray(poses, np.float64)
        later = CameraPacker.poses_needed(self.world.config.stream.chunk_frames, False)
        if len(path) < self.poses_needed or (len(path) - self.poses_needed) % later:
            raise CameraError(f"expected {self.poses_needed} + {later}k poses, found {len(path)}; trim or extend the camera path")
        start = 0
        while start < len(path):
            end = start + self.poses_needed
            yield self.step(path[start:end])
            start = end

    def play(self, keys: Keys, chunks: int | None = None) -> Iterator[Chunk]:
        """Generate with keys held: so many chunks, or until the time axis ends."""
        made = 0
        while not self.ended and made != chunks:
            yield self.hold(keys)
            made += 1

    def _step(self, make_poses: Callable[[int], NDArray[np.float64]]) -> Chunk:
        self._open()
        try:
            with self.world.turns.take(self._cancel.is_set) as waited:
                rollout = self._open()
                self._refuse_failed()
                if self.ended:
                    limit = self.world.config.dit.rope_frames
                    raise StreamEnded(
                        f"the model's time axis ends after {limit} latent frames ({8 * limit - 7} frames); reset, or start with at_end='continue'"
                    )
                self.world.engine.activate()
                return self._generate(rollout, make_poses, waited)
        except Cancelled:
            self._cancel.clear()
            raise

    def _generate(self, rollout: Rollout, make_poses: Callable[[int], NDArray[np.float64]], waited: float) -> Chunk:
        anew, chunks = not rollout.has_room, rollout.chunks
        needed = self.poses_needed
        given = make_poses(needed)
        if given.ndim != 3 or len(given) != needed:
            raise CameraError(f"chunk {self.chunks_done} takes {needed} poses (P, 4, 4), found shape {given.shape}; see poses_needed")
        poses, first = given, self.frames_done
        monitor = Monitor(rollout.work, self.on_progress, self._cancel.is_set)
        try:
            if anew:
                assert self._last is not None
                frame, pose = self._last
                poses, first = np.concatenate([pose[None], given]), first - 1
                rollout.begin(self.world.encode_image(to_model_range(frame)))
                monitor = Monitor(rollout.work, self.on_progress, self._cancel.is_set)
            rows = self._intrinsics[np.minimum(np.arange(first, first + len(poses)), len(self._intrinsics) - 1)]
            latents, frames = rollout.step(poses, rows, self.seed, self.chunks_done, monitor)
        except BaseException as error:
            # An interrupted commit or decode leaves half of a chunk; before that nothing has changed, but an engine is not trusted again.
            if monitor.binding or isinstance(error, EngineError):
                self._failure = error
            rollout.chunks = chunks
            raise
        if anew:
            # Its frame 0 is the frame it began from.
            frames = frames[1:]
            self.runs_done += 1
        index, start = self.chunks_done, self.frames_done
        self.chunks_done += 1
        self.frames_done += len(frames)
        self._last = frames[-1].copy(), given[-1]
        return Chunk(index, frames, latents, given, monitor.seconds, waited, start, self.runs_done, self.ended)

    def cancel(self) -> None:
        """Make the step in progress, or the next one if none is, raise Cancelled. May be called from any thread, and never waits."""
        self._cancel.set()
        self.world.turns.wake()

    def reset(self, *, seed: int | None = None) -> None:
        """Back to the first frame, with the same prompt; the same seed (None: the one before) gives the same bytes again."""
        rollout = self._open()
        if seed is not None:
            self.seed = checked_seed(seed)
        rollout.begin(self._first_latent)
        self.camera = ActionIntegrator(self.camera.scheme)
        self.chunks_done = self.frames_done = self.runs_done = 0
        self._cancel.clear()
        self._failure = self._last = None

    def fork(self) -> Stream:
        """A second stream that goes on from the same moment by itself. Raises as `step` does."""
        self._open()
        with self.world.turns.take(self._cancel.is_set):
            rollout = self._open()
            self._refuse_failed()
            self.world.engine.activate()
            other = copy.copy(self)
            other.camera = copy.copy(self.camera)
            other._cancel = threading.Event()
            other._rollout = rollout.fork()
        return other

    def close(self) -> None:
        """Give back the stream's memory. Harmless when repeated."""
        self._rollout = self._last = self._failure = None

    def _open(self) -> Rollout:
        if self._rollout is None or self.world.closed:
            raise StreamClosed(f"the {'stream' if self._rollout is None else 'world'} is closed; start another")
        return self._rollout

    def _refuse_failed(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the stream failed in chunk {self.chunks_done} ({self._failure}); reset it or start another") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def checked_seed(seed: int) -> int:
    """The seed, from 0 to 2**64 - 1. Raises InputError for another."""
    if not 0 <= seed < 2**64:
        raise InputError(f"expected a seed from 0 to 2**64 - 1, found {seed}; choose another")
    return seed

"""Writers of what a session makes: a growing mp4, PNG frames, latents; and a probe that reads an mp4 back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, Self

import numpy as np

from sanawm.errors import InputError
from sanawm_runtime.mp4 import FragmentEncoder, encoder_lanes

# Shape letters: F frames, H pixel rows, W pixel columns; C latent channels, T latent frames, h and w latent rows and columns.


class VideoWriter(Protocol):
    """Takes chunks as they are generated: pixels or latents, as `takes` says. `frames` counts what is written.

    `append` writes a chunk. `begin` starts what can be done side by side with other chunks; the calls that it returns write, and are made one
    after the other in the chunks' order.
    """

    path: Path
    frames: int
    takes: Literal["frames", "latents"]

    def append(self, chunk: np.ndarray) -> None: ...
    def begin(self, chunk: np.ndarray) -> Callable[[], None]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None: ...


class _Writer:
    """What the writers share: the state machine and the first-error-wins rule."""

    takes: Literal["frames", "latents"] = "frames"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames = 0
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(InputError, OSError):  # the error that led here is the one to see
            self.abort()

    def append(self, chunk: np.ndarray) -> None:
        raise NotImplementedError

    def begin(self, chunk: np.ndarray) -> Callable[[], None]:
        return lambda: self.append(chunk)

    def close(self) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"the writer of {self.path} is closed")


def _check_frames(chunk: np.ndarray, height: int | None = None, width: int | None = None) -> None:
    expected = ("F", height or "H", width or "W", 3)
    fits = chunk.ndim == 4 and chunk.shape[3] == 3 and (height is None or chunk.shape[1:3] == (height, width))
    if chunk.dtype != np.uint8 or not fits:
        raise ValueError(f"expected frames of dtype uint8 and shape {expected}, found {chunk.dtype} {chunk.shape}")


class Mp4Writer(_Writer):
    """An H.264 mp4 at `path` that can be watched while it grows.

    Each `append` of frames (F, H, W, 3) uint8 RGB adds one whole fragment, which starts with a keyframe, so that after every call the
    file is a complete video of the chunks so far. It appears with its first chunk; until then whatever was at `path` stays, and a failure
    leaves it so. An interruption or a full disk later keeps the chunks already written. Rows and columns are even (4:2:0 chroma); colours
    are tagged and converted as BT.709, limited range. `codec` is "auto" (libx264), "libx264", or "h264_nvenc", which never falls back to
    another; `lanes` of it encode side by side what `begin` gives them. Raises InputError for a place that cannot be written, EngineError
    for a missing encoder.
    """

    def __init__(self, path: str | os.PathLike[str], fps: int, height: int, width: int, codec: str = "auto", lanes: int = 1) -> None:
        super().__init__(Path(path))
        self.height, self.width = height, width
        _check_place(self.path)
        self._encoder = FragmentEncoder(fps, height, width, codec, lanes)
        self.codec = self._encoder.codec
        self._temporary: Path | None = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with _writing(self.path):
            # Opened now, so that a place that cannot be written is found before minutes of generation.
            self._file: BinaryIO = open(self._temporary, "w+b", buffering=0)  # noqa: SIM115
        self._length = 0

    def append(self, chunk: np.ndarray) -> None:
        self.begin(chunk)()

    def begin(self, chunk: np.ndarray) -> Callable[[], None]:
        self._check_open()
        _check_frames(chunk, self.height, self.width)
        if not len(chunk):
            return lambda: None
        encoded = self._encoder.begin(chunk)
        return lambda: self._write(encoded(), len(chunk))

    def _write(self, fragment: bytes, frames: int) -> None:
        self._check_open()
        data = fragment if self.frames else self._encoder.head + fragment
        try:
            with _writing(self.path):
                _write_all(self._file, data)
        except InputError as error:
            kept = f"; the {self.frames} frames before are kept" if self.frames else ""
            with contextlib.suppress(InputError):
                self.close()
            raise InputError(f"{error}{kept}") from error.__cause__
        self._length += len(data)
        self.frames += frames
        if self._temporary is not None:
            self._put_in_place(self._temporary)

    def close(self) -> None:
        """End the file after its last whole fragment; without a single frame nothing stays on disk."""
        if self.closed:
            return
        self.closed = True
        self._encoder.close()
        try:
            with _writing(self.path):
                # An interruption may have left part of a fragment behind the last whole one.
                self._file.truncate(self._length)
        finally:
            self._file.close()
            if self._temporary is not None and self.frames:
                self._put_in_place(self._temporary)
            elif self._temporary is not None:
                self._temporary.unlink(missing_ok=True)

    def _put_in_place(self, temporary: Path) -> None:
        try:
            with _writing(self.path):
                os.replace(temporary, self.path)
        except InputError:
            temporary.unlink(missing_ok=True)
            self._temporary, self.frames = None, 0
            self.close()
            raise
        self._temporary = None


class PngWriter(_Writer):
    """Frames as `frame_000000.png`, … in a directory, which is made if missing; each file is whole or absent.

    Raises InputError for a directory that already holds frames, because two runs would mix, or that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(Path(path))
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, and PNG frames go into a directory; choose another name")
        with _writing(self.path):
            self.path.mkdir(exist_ok=True)
            if next(self.path.glob("frame_*.png"), None) is not None:
                raise InputError(f"{self.path} holds frames of another run; remove them or choose another directory")

    def append(self, chunk: np.ndarray) -> None:
        """Write frames (F, H, W, 3) uint8 RGB."""
        from PIL import Image

        self._check_open()
        _check_frames(chunk)
        for frame in chunk:
            place = self.path / f"frame_{self.frames:06d}.png"
            with _writing(self.path), _renamed(place) as temporary:
                # Level 1: most of the size saved at a fraction of the time, which is spent while the next chunk waits.
                Image.fromarray(frame).save(temporary, format="PNG", compress_level=1)
            self.frames += 1

    def close(self) -> None:
        self.closed = True


class LatentWriter(_Writer):
    """Latents as one `.npy` array (C, T, h, w), whole at `close` and absent before; memory use does not grow with the stream.

    `append` takes chunks (C, F, h, w) of float32 or float16. Leaving by an exception discards what was written. Raises InputError for a
    place that cannot be written.
    """

    takes = "latents"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(Path(path))
        _check_place(self.path)
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.float32)
        self._raw_path = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with _writing(self.path):
            self._raw: BinaryIO = open(self._raw_path, "w+b", buffering=0)  # noqa: SIM115

    def append(self, chunk: np.ndarray) -> None:
        self._check_open()
        if chunk.ndim != 4 or chunk.dtype not in (np.float32, np.float16):
            raise ValueError(f"expected latents of dtype float32 or float16 and shape (C, F, h, w), found {chunk.dtype} {chunk.shape}")
        shape = (chunk.shape[0], *chunk.shape[2:])
        if not self.frames:
            self._shape, self._dtype = shape, chunk.dtype
        if (shape, chunk.dtype) != (self._shape, self._dtype):
            raise ValueError(f"expected (C, h, w) = {self._shape} {self._dtype} as in the first chunk, found {shape} {chunk.dtype}")
        with _writing(self.path):
            _write_all(self._raw, np.ascontiguousarray(chunk.transpose(1, 0, 2, 3)).data.cast("B"))
        self.frames += chunk.shape[1]

    def close(self) -> None:
        """Turn the frame-major stream into the (C, T, h, w) array and put it in place; without a single frame nothing is written."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.frames:
                self._finish()
        finally:
            self.abort()

    def abort(self) -> None:
        self.closed = True
        self._raw.close()
        self._raw_path.unlink(missing_ok=True)

    def _finish(self) -> None:
        channels, height, width = self._shape
        stream = np.memmap(self._raw_path, self._dtype, "r", shape=(self.frames, channels, height, width))
        shape = (channels, self.frames, height, width)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        with _writing(self.path), _renamed(self.path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for channel in range(channels):
                file.write(stream[:, channel].tobytes())


def open_writer(
    path: str | os.PathLike[str], *, fps: int, height: int, width: int, codec: str = "auto"
) -> Mp4Writer | PngWriter | LatentWriter:
    """The writer that a path asks for: `.mp4` video, `.npy` latents, a directory (no suffix, or one that exists) PNG frames.

    `height` and `width` are in pixels. Raises InputError for any other suffix or a place that cannot be written, EngineError for a missing
    encoder.
    """
    text = os.fspath(path)
    place = Path(text)
    suffix = place.suffix.lower()
    if place.is_dir() or text.endswith(("/", os.sep)) or not suffix:
        return PngWriter(place)
    if suffix == ".mp4":
        return Mp4Writer(place, fps, height, width, codec, encoder_lanes(codec))
    if suffix == ".npy":
        return LatentWriter(place)
    if suffix == ".png":
        raise InputError(f"{text}: PNG frames go into a directory; give its name without a suffix, such as {place.stem}/")
    raise InputError(f"{text}: unknown output '{suffix}'; give a name ending in .mp4 (video) or .npy (latents), or a directory (PNGs)")


def probe_video(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Frames, width, height, fps and duration in seconds of a video file, counted from its packets. Raises InputError."""
    import av

    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            base = stream.time_base
            if base is None or stream.average_rate is None or not packets:
                raise InputError(f"{path}: holds no frames")
            end = max((packet.pts or 0) + (packet.duration or 0) for packet in packets)
            return {
                "frames": len(packets),
                "width": stream.width,
                "height": stream.height,
                "fps": float(stream.average_rate),
                "duration": float(end * base),
            }
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"{path}: expected a video file, found something that cannot be read as one ({error})") from error


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the directory {path.parent} does not exist; create it or choose another place")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; choose another name")


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error


@contextlib.contextmanager
def _renamed(place: Path) -> Iterator[Path]:
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)

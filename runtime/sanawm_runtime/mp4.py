"""Frames to the fragments of a streamable mp4."""

from __future__ import annotations

import concurrent.futures
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from sanawm.errors import EngineError, InputError

# No reordering and no look-ahead: every frame that goes in comes out, so a chunk is complete when its last frame was encoded. Keyframes
# come only where we ask for one, at the start of a chunk.
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "forced-idr": "1", "sc_threshold": "0"},
    "h264_nvenc": {"preset": "p4", "tune": "ull", "rc": "vbr", "cq": "19", "delay": "0", "zerolatency": "1", "forced-idr": "1", "bf": "0"},
}
_KEYFRAME_NEVER = 1_000_000
_MOVFLAGS = "frag_keyframe+empty_moov+default_base_moof+skip_trailer"
_BT709 = 1  # colour primaries, transfer and matrix share this code point (ISO/IEC 23091-2)
_LIMITED = 1


def encoder_lanes(codec: str = "auto") -> int:
    """Encoders that this machine's processors keep busy side by side: one for every four, four at most. A hardware encoder is one."""
    return 1 if codec == "h264_nvenc" else min(max(_processors() // 4, 1), 4)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FragmentEncoder:
    """An H.264 encoder whose every `encode` gives a self-contained fragment.

    `head` is what a file starts with (ftyp, moov); the concatenation of `head` and any number of fragments in order is an mp4. Since each
    fragment starts with a keyframe, several can be encoded at once: `begin` hands frames to the next of `lanes` encoders, which share the
    processors, and cuts the very first frames into a part for each, because someone waits for these. Raises InputError for odd sizes or an
    unknown codec, EngineError for an encoder that this machine lacks.
    """

    def __init__(self, fps: int, height: int, width: int, codec: str = "auto", lanes: int = 1) -> None:
        self.codec = "libx264" if codec == "auto" else codec
        if self.codec not in _OPTIONS:
            raise InputError(f"unknown video codec '{codec}'; choose auto, {', '.join(_OPTIONS)}")
        if height % 2 or width % 2 or height <= 0 or width <= 0:
            raise InputError(f"mp4 video needs an even number of rows and columns, found {height} x {width}; write PNG frames instead")
        if fps <= 0:
            raise InputError(f"mp4 video needs a positive number of frames a second, found {fps}")
        # Encoders wait for their slowest thread, row after row of a frame, so together they have up to twice as many as there are processors.
        threads = min(_processors(), 2 * _processors() // lanes)
        self._lanes = [_Lane(fps, height, width, self.codec, threads) for _ in range(lanes)]
        # A thread a lane, so that each encodes its fragments in order.
        self._threads = [concurrent.futures.ThreadPoolExecutor(1, "sanawm-encoder") for _ in range(lanes)]
        self._fragments = self._frames = 0
        self.head = self._lanes[0].head

    def begin(self, frames_FHWC: np.ndarray) -> Callable[[], bytes]:
        """Start to encode RGB frames (F, H, W, 3) uint8, F >= 1; they may not change before the result was called for.

        The result waits and gives one fragment (moof, mdat), or several for the first frames. It raises EngineError if the encoder fails.
        """
        parts = min(len(self._lanes), len(frames_FHWC)) if not self._fragments else 1
        begun = [self._submit(part) for part in np.array_split(frames_FHWC, parts)]
        return lambda: b"".join(part.result() for part in begun)

    def _submit(self, frames_FHWC: np.ndarray) -> concurrent.futures.Future[bytes]:
        lane = self._fragments % len(self._lanes)
        begun = self._threads[lane].submit(self._lanes[lane].encode, frames_FHWC, self._fragments, self._frames)
        self._fragments += 1
        self._frames += len(frames_FHWC)
        return begun

    def encode(self, frames_FHWC: np.ndarray) -> bytes:
        """`begin`, and wait for it."""
        return self.begin(frames_FHWC)()

    def close(self) -> None:
        """Wait for what was begun, and end."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        for lane in self._lanes:
            lane.close()


class _Lane:
    """One encoder. The muxer itself holds a fragment back until the next keyframe arrives, so each fragment is made by a short-lived muxer of
    its own that continues the numbering and the time of the one before. `threads` is how many the encoder may use."""

    def __init__(self, fps: int, height: int, width: int, codec: str, threads: int) -> None:
        import av

        self._av, self._codec = av, codec
        # One for all frames: to set up a conversion takes as long as the conversion of a frame.
        self._converter = av.video.reformatter.VideoReformatter()
        sink = io.BytesIO()
        self._muxer = av.open(sink, "w", format="mp4", options={"movflags": _MOVFLAGS})
        try:
            stream: Any = self._muxer.add_stream(codec, rate=fps, options=_OPTIONS[codec])
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.thread_count = max(threads, 1)
            context.gop_size = _KEYFRAME_NEVER
            context.max_b_frames = 0
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = _LIMITED
            self._muxer.start_encoding()
        except (av.error.FFmpegError, av.codec.codec.UnknownCodecError, OSError) as error:
            raise EngineError(
                f"the video encoder {codec} does not start on this machine ({getattr(error, 'strerror', None) or error}); "
                + ("write PNG frames instead" if codec == "libx264" else "use --codec auto for libx264 on the CPU")
            ) from error
        self._stream = stream
        self.head = sink.getvalue()

    def encode(self, frames_FHWC: np.ndarray, fragment: int, first: int) -> bytes:
        """The fragment with this number, from 0, whose first frame is frame `first` of the video."""
        av = self._av
        sink = io.BytesIO()
        options = {
            "movflags": f"{_MOVFLAGS}+frag_discont",
            "fragment_index": str(fragment + 1),
            # Otherwise the muxer moves each fragment's time back to zero.
            "avoid_negative_ts": "disabled",
        }
        try:
            with av.open(sink, "w", format="mp4", options=options) as muxer:
                stream = muxer.add_stream_from_template(self._stream)
                for index, pixels in enumerate(frames_FHWC):
                    for packet in self._stream.encode(self._picture(pixels, first + index, key=index == 0)):
                        packet.stream = stream
                        muxer.mux(packet)
        except av.error.FFmpegError as error:
            raise EngineError(f"the video encoder {self._codec} failed ({error.strerror}); write PNG frames instead") from error
        return _media_boxes(sink.getvalue())

    def close(self) -> None:
        self._muxer.close()

    def _picture(self, pixels: np.ndarray, number: int, key: bool) -> Any:
        video = self._av.video
        colours = video.reformatter.Colorspace.ITU709
        ranges = video.reformatter.ColorRange
        rgb = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture: Any = self._converter.reformat(
            rgb, format="yuv420p", src_colorspace=colours, dst_colorspace=colours, src_color_range=ranges.JPEG, dst_color_range=ranges.MPEG
        )
        picture.pts = number
        picture.time_base = self._stream.codec_context.time_base
        picture.pict_type = video.frame.PictureType.I if key else video.frame.PictureType.NONE
        return picture


def _media_boxes(data: bytes) -> bytes:
    """The moof and mdat boxes of an mp4 in memory, in order."""
    kept = []
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8:  # 0 and 1 announce other ways to state a size, which the muxer uses beyond 4 GiB
            raise EngineError(f"the mp4 muxer wrote a box of {size} bytes; make the chunk smaller")
        if data[start + 4 : start + 8] in (b"moof", b"mdat"):
            kept.append(data[start : start + size])
        start += size
    return b"".join(kept)

"""Frames to the fragments of a streamable mp4."""

from __future__ import annotations

import io
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


class FragmentEncoder:
    """One H.264 encoder whose every `encode` gives one self-contained fragment.

    `head` is what a file starts with (ftyp, moov); the concatenation of `head` and any number of fragments in order is an mp4. The muxer
    itself holds a fragment back until the next keyframe arrives, so each fragment is made by a short-lived muxer of its own that continues
    the numbering and the time of the one before. Raises InputError for odd sizes or an unknown codec, EngineError for an encoder that this
    machine lacks.
    """

    def __init__(self, fps: int, height: int, width: int, codec: str = "auto") -> None:
        import av

        self.codec = "libx264" if codec == "auto" else codec
        if self.codec not in _OPTIONS:
            raise InputError(f"unknown video codec '{codec}'; choose auto, {', '.join(_OPTIONS)}")
        if height % 2 or width % 2 or height <= 0 or width <= 0:
            raise InputError(f"mp4 video needs an even number of rows and columns, found {height} x {width}; write PNG frames instead")
        if fps <= 0:
            raise InputError(f"mp4 video needs a positive number of frames a second, found {fps}")
        self._av = av
        # One for all frames: to set up a conversion takes as long as the conversion of a frame.
        self._converter = av.video.reformatter.VideoReformatter()
        self._fragments = 0
        self._frames = 0
        sink = io.BytesIO()
        self._muxer = av.open(sink, "w", format="mp4", options={"movflags": _MOVFLAGS})
        try:
            stream: Any = self._muxer.add_stream(self.codec, rate=fps, options=_OPTIONS[self.codec])
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.gop_size = _KEYFRAME_NEVER
            context.max_b_frames = 0
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = _LIMITED
            self._muxer.start_encoding()
        except (av.error.FFmpegError, av.codec.codec.UnknownCodecError, OSError) as error:
            raise EngineError(
                f"the video encoder {self.codec} does not start on this machine ({getattr(error, 'strerror', None) or error}); "
                + ("write PNG frames instead" if self.codec == "libx264" else "use --codec auto for libx264 on the CPU")
            ) from error
        self._stream = stream
        self.head = sink.getvalue()

    def encode(self, frames_FHWC: np.ndarray) -> bytes:
        """One fragment (moof, mdat) from RGB frames (F, H, W, 3) uint8, F >= 1. Raises EngineError if the encoder fails."""
        av = self._av
        sink = io.BytesIO()
        options = {
            "movflags": f"{_MOVFLAGS}+frag_discont",
            "fragment_index": str(self._fragments + 1),
            # Otherwise the muxer moves each fragment's time back to zero.
            "avoid_negative_ts": "disabled",
        }
        try:
            with av.open(sink, "w", format="mp4", options=options) as muxer:
                stream = muxer.add_stream_from_template(self._stream)
                for index, pixels in enumerate(frames_FHWC):
                    for packet in self._stream.encode(self._picture(pixels, key=index == 0)):
                        packet.stream = stream
                        muxer.mux(packet)
        except av.error.FFmpegError as error:
            raise EngineError(f"the video encoder {self.codec} failed ({error.strerror}); write PNG frames instead") from error
        self._fragments += 1
        return _media_boxes(sink.getvalue())

    def close(self) -> None:
        self._muxer.close()

    def _picture(self, pixels: np.ndarray, key: bool) -> Any:
        video = self._av.video
        colours = video.reformatter.Colorspace.ITU709
        ranges = video.reformatter.ColorRange
        rgb = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture: Any = self._converter.reformat(
            rgb, format="yuv420p", src_colorspace=colours, dst_colorspace=colours, src_color_range=ranges.JPEG, dst_color_range=ranges.MPEG
        )
        picture.pts = self._frames
        picture.time_base = self._stream.codec_context.time_base
        picture.pict_type = video.frame.PictureType.I if key else video.frame.PictureType.NONE
        self._frames += 1
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

"""Tiled decoding of long or large clips with linear blending.

The non-causal decoder needs a whole clip at once, which at 720p exceeds memory and 32-bit indices after a few seconds. Tiles overlap in
space and time; in an overlap the earlier tile fades out as the later fades in.

Letters: B batch, C latent channels, T, h and w latent frames, rows and columns, F, H and W pixel frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sanawm.errors import InputError
from sanawm.model.vae.vae import VideoVAE, check_latent


@dataclass(frozen=True)
class Tiling:
    """Size of tiles and distance between them, in pixels and pixel frames; defaults are those of SANA-WM's bidirectional pipeline.

    A tile in time holds one latent frame more than `frames` says: as the first of its tile it decodes to a single pixel frame, which is
    dropped.
    """

    side: int = 512
    side_stride: int = 448
    frames: int = 96
    frames_stride: int = 64

    def __post_init__(self) -> None:
        for what, size, stride in (("side", self.side, self.side_stride), ("frames", self.frames, self.frames_stride)):
            # With an overlap past half a tile three tiles would meet in one place and two ramps would not sum to one.
            if not 0 < stride < size <= 2 * stride:
                raise InputError(f"tiles of {what} {size} need a stride of at least half and less than all of that, found {stride}")


def decode_tiled(vae: VideoVAE, z_BCThw: Tensor, causal: bool | None = None, tiling: Tiling | None = None) -> Tensor:
    """`VideoVAE.decode` in tiles: (B,C,T,h,w) -> (B,3,8T-7,32h,32w). Raises InputError for another shape or unusable tiles."""
    return torch.cat(list(tiled_segments(vae, z_BCThw, causal, tiling)), dim=2)


def tiled_segments(vae: VideoVAE, z_BCThw: Tensor, causal: bool | None = None, tiling: Tiling | None = None) -> Iterator[Tensor]:
    """Finished parts (B,3,n,H,W) of a tiled decode in order, so that only one tile in time is in memory.

    Tiles are aligned by the pixel frames they stand for; diffusers 0.42 shows every tile after the first one frame late. Raises InputError
    for a latent of another shape or unusable tiles.
    """
    check_latent(vae.config, z_BCThw)
    tiling = tiling or Tiling()
    stride = vae.config.temporal_stride
    frames, step = _in_latents(tiling.frames, stride), _in_latents(tiling.frames_stride, stride)
    tail: Tensor | None = None
    spans = tile_spans(z_BCThw.shape[2], frames + 1, step)
    for index, (start, stop) in enumerate(spans):
        video = _decode_spatial(vae, z_BCThw[:, :, start:stop], causal, tiling)
        if tail is not None:
            video = video[:, :, 1:]
            overlap = tail.shape[2]
            weight = fade_in(overlap, video.device).reshape(-1, 1, 1)
            blend = torch.lerp(tail.float(), video[:, :, :overlap].float(), weight).to(video.dtype)
            video = torch.cat([blend, video[:, :, overlap:]], dim=2)
        if index + 1 == len(spans):
            yield video
            return
        # The next tile's first frame is the one after those of the latent frame it starts with.
        finished = step * stride + (index == 0)
        yield video[:, :, :finished]
        tail = video[:, :, finished:]


def tile_spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, stop) of tiles of at most `size` every `stride`, the last ending at `length`."""
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        start = spans[-1][0] + stride
        spans.append((start, min(start + size, length)))
    return spans


def tile_weights(spans: list[tuple[int, int]], scale: int, device: torch.device) -> list[Tensor]:
    """Weight of every pixel of each span, `scale` pixels a latent: 1 where a tile is alone, linear ramps in overlaps; they sum to 1."""
    weights = [torch.ones((stop - start) * scale, device=device) for start, stop in spans]
    for (_, stop), (start, _), before, after in zip(spans, spans[1:], weights, weights[1:]):
        overlap = (stop - start) * scale
        ramp = fade_in(overlap, device)
        after[:overlap] = ramp
        before[before.shape[0] - overlap :] = 1 - ramp
    return weights


def fade_in(length: int, device: torch.device) -> Tensor:
    """fp32 weights 0, 1/length, 2/length, ... of a tile that begins where another one ends."""
    return torch.arange(length, dtype=torch.float32, device=device) / length


def _decode_spatial(vae: VideoVAE, z_BCThw: Tensor, causal: bool | None, tiling: Tiling) -> Tensor:
    batch, _, frames, h, w = z_BCThw.shape
    scale = vae.config.spatial_stride
    size, stride = _in_latents(tiling.side, scale), _in_latents(tiling.side_stride, scale)
    rows, columns = tile_spans(h, size, stride), tile_spans(w, size, stride)
    if len(rows) == len(columns) == 1:
        return vae.decode(z_BCThw, causal)
    # fp32, since sums of weighted bf16 tiles would lose a bit at every overlap.
    pixel_frames = (frames - 1) * vae.config.temporal_stride + 1
    out = z_BCThw.new_zeros((batch, 3, pixel_frames, h * scale, w * scale), dtype=torch.float32)
    row_weights, column_weights = (tile_weights(spans, scale, z_BCThw.device) for spans in (rows, columns))
    for (top, bottom), row_weight in zip(rows, row_weights, strict=True):
        for (left, right), column_weight in zip(columns, column_weights, strict=True):
            tile = vae.decode(z_BCThw[:, :, :, top:bottom, left:right], causal)
            place = out[:, :, :, top * scale : bottom * scale, left * scale : right * scale]
            place += tile * (row_weight[:, None] * column_weight)
    return out.to(z_BCThw.dtype)


def _in_latents(pixels: int, stride: int) -> int:
    if pixels % stride:
        raise InputError(f"tile sizes and strides must be multiples of the VAE's stride {stride}, found {pixels}; correct the tiling")
    return pixels // stride

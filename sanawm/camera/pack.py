"""Camera inputs of the model: per-latent-frame conditions and per-pixel-frame Plücker maps, for a clip or chunk by chunk.

Shapes: F pixel frames, T = (F - 1) / 8 + 1 latent frames, h x w the latent grid. Latent frame 0 stands for pixel frame 0, latent frame
i >= 1 for pixel frames 8i - 7 to 8i.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sanawm.camera.intrinsics import normalise_intrinsics
from sanawm.camera.poses import check_poses, relative_to
from sanawm.camera.rays import pixel_rays, rotate
from sanawm.config import StreamConfig, VAEConfig, WorldConfig
from sanawm.errors import CameraError, InputError

# Pixel frames a latent frame stands for, 8, and those a streaming chunk adds, 24.
TEMPORAL_STRIDE = VAEConfig.temporal_stride
STREAMING_STRIDE = StreamConfig.chunk_frames * TEMPORAL_STRIDE


def frames_to_snap(frames: int, kind: Literal["bidirectional", "streaming"], upper_bound: int | None = None) -> int:
    """The length nearest to `frames` that a sampler can make: 8k + 1 pixel frames (bidirectional) or 24k + 1, k >= 1 (streaming).

    Halfway goes up. `upper_bound` (say, the length of a pose file) is never exceeded. Raises InputError when nothing fits below it.
    """
    if kind not in ("bidirectional", "streaming"):
        raise InputError(f"unknown sampler '{kind}'; choose bidirectional or streaming")
    stride, least = (TEMPORAL_STRIDE, 1) if kind == "bidirectional" else (STREAMING_STRIDE, STREAMING_STRIDE + 1)
    if frames < 1:
        raise InputError(f"expected at least 1 frame, found {frames}; ask for {stride}k + 1 frames")
    snapped = max(least, (frames - 1 + stride // 2) // stride * stride + 1)
    if upper_bound is not None and snapped > upper_bound:
        snapped = (upper_bound - 1) // stride * stride + 1
        if snapped < least:
            raise InputError(f"expected at least {least} frames for the {kind} sampler, found {upper_bound}; extend the camera path")
    return snapped


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 8k + 1 pixel frames. Raises CameraError for another length."""
    if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
        lower = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        raise CameraError(f"expected 8k + 1 pixel frames, found {frames}; use {lower} or {lower + TEMPORAL_STRIDE}")
    return (frames - 1) // TEMPORAL_STRIDE + 1


def camera_conditions(c2w_rel: ArrayLike, intrinsics: ArrayLike, config: WorldConfig) -> NDArray[np.float32]:
    """Pose and intrinsics of every latent frame, those of its last pixel frame 8i.

    c2w_rel: (F, 4, 4) relative to frame 0 (`relative_to_first`); intrinsics: (F, 4) in pixels of the model's image, that is after
    `adjust_for_resize_crop`. Returns (1, T, 20) float32: the matrix row-major, then fx fy cx cy in latent pixels. Raises CameraError.
    """
    poses, rows = _clip(c2w_rel, intrinsics, config)
    return _conditions(poses[::TEMPORAL_STRIDE], rows[::TEMPORAL_STRIDE])


def chunk_plucker(c2w_rel: ArrayLike, intrinsics: ArrayLike, config: WorldConfig) -> NDArray[np.float32]:
    """Plücker coordinates of eight pixel frames for every latent frame.

    Arguments as for `camera_conditions`. Latent frame i >= 1 holds pixel frames 8i - 7 to 8i; latent frame 0 holds 0 to 7 (the last one
    repeated in a clip of a single frame). Returns (1, 48, T, h, w) float32, channel 6j + (0..2 direction, 3..5 moment) for the j-th of the
    eight. Raises CameraError.
    """
    poses, rows = _clip(c2w_rel, intrinsics, config)
    return _plucker(poses, rows, config, first=True)


class CameraChunk(NamedTuple):
    """Camera inputs of consecutive latent frames."""

    first_frame: int
    # (1, n, 20) float32
    camera_conditions: NDArray[np.float32]
    # (1, 48, n, h, w) float32
    chunk_plucker: NDArray[np.float32]


class CameraPacker:
    """Camera inputs of a stream, made chunk by chunk with the same bits as for the whole clip.

    Between chunks it keeps the first pose and a frame count, however long the stream.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.frames = 0
        self._origin = np.eye(4)

    @staticmethod
    def poses_needed(latents: int, first: bool) -> int:
        """Pixel-frame poses that a chunk of so many latent frames takes: 8(n - 1) + 1 for the first chunk, 8n later."""
        return TEMPORAL_STRIDE * (latents - 1) + 1 if first else TEMPORAL_STRIDE * latents

    def push(self, c2w: ArrayLike, intrinsics: ArrayLike) -> CameraChunk:
        """Pack the next poses.

        c2w: (P, 4, 4) camera-to-world in any fixed world axes, P as `poses_needed` says; the stream's first pose becomes the origin.
        intrinsics: (4,) or (P, 4) in pixels of the model's image. Raises CameraError, which leaves the packer as it was.
        """
        first = self.frames == 0
        poses = check_poses(c2w, source="the streamed camera path", first_frame=self.frames)
        count = len(poses)
        if (count - first) % TEMPORAL_STRIDE:
            raise CameraError(
                f"expected {'8(n - 1) + 1' if first else '8n'} poses for a {'first' if first else 'later'} chunk of n latent frames, "
                f"found {count}; use CameraPacker.poses_needed"
            )
        if self.frames == 1:
            # The map of latent frame 0 looks seven pixel frames ahead; it was made without them.
            raise CameraError("a first chunk of one pose is a whole clip and cannot be continued; start the stream with at least 9 poses")
        rows = _latent_intrinsics(_sequence(intrinsics, count), self.config)
        origin = poses[0] if first else self._origin
        relative = relative_to(origin, poses)
        if first:
            relative[0] = np.eye(4)
        start = 0 if first else TEMPORAL_STRIDE - 1
        chunk = CameraChunk(
            0 if first else (self.frames - 1) // TEMPORAL_STRIDE + 1,
            _conditions(relative[start::TEMPORAL_STRIDE], rows[start::TEMPORAL_STRIDE]),
            _plucker(relative, rows, self.config, first),
        )
        self._origin = origin.copy()
        self.frames += count
        return chunk


def _clip(c2w_rel: ArrayLike, intrinsics: ArrayLike, config: WorldConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Poses (F, 4, 4) and intrinsics (F, 4) in latent pixels of a whole clip, checked."""
    poses = check_poses(c2w_rel, source="the relative camera path")
    if not np.array_equal(poses[0], np.eye(4)):
        raise CameraError("the relative camera path must start at the identity; pass it through relative_to_first")
    latent_frames(len(poses))
    return poses, _latent_intrinsics(_sequence(intrinsics, len(poses)), config)


def _sequence(intrinsics: ArrayLike, count: int) -> NDArray[np.float64]:
    """One row a pose; a sequence of another length is a mistake here, unlike in a file."""
    rows = normalise_intrinsics(intrinsics, count)
    if np.shape(intrinsics) not in ((4,), (count, 4)):
        raise CameraError(
            f"expected intrinsics of shape (4,) or ({count}, 4) for {count} poses, found {np.shape(intrinsics)}; use normalise_intrinsics"
        )
    return rows


def _latent_intrinsics(rows: NDArray[np.float64], config: WorldConfig) -> NDArray[np.float64]:
    scale_x, scale_y = config.dit.width / config.image_width, config.dit.height / config.image_height
    return rows * [scale_x, scale_y, scale_x, scale_y]


def _conditions(poses: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.concatenate([poses.reshape(len(poses), 16), rows], axis=1).astype(np.float32)[None]


def _plucker(poses: NDArray[np.float64], rows: NDArray[np.float64], config: WorldConfig, first: bool) -> NDArray[np.float32]:
    h, w = config.dit.height, config.dit.width
    maps = _rays_and_moments(poses, rows, h, w)
    if first:
        # Latent frame 0 shows frames 0..7 although it stands for frame 0 alone: the published layout.
        head = np.minimum(np.arange(TEMPORAL_STRIDE), len(maps) - 1)
        maps = np.concatenate([maps[head], maps[1:]])
    # (8n, h, w, 6) -> (48, n, h, w)
    grouped = maps.reshape(-1, TEMPORAL_STRIDE, h, w, 6).transpose(1, 4, 0, 2, 3)
    return np.ascontiguousarray(grouped.reshape(1, TEMPORAL_STRIDE * 6, -1, h, w))


def _rays_and_moments(poses: NDArray[np.float64], rows: NDArray[np.float64], h: int, w: int) -> NDArray[np.float32]:
    """World directions d of length one and moments o x d of all pixels, (F, h, w, 6): float64 inside, float32 out.

    Everything is elementwise, for the same bits in every chunking.
    """
    world = rotate(poses, pixel_rays(rows, h, w))
    dx, dy, dz = np.moveaxis(world / np.sqrt(world[..., 0] ** 2 + world[..., 1] ** 2 + world[..., 2] ** 2)[..., None], -1, 0)
    ox, oy, oz = poses[:, :3, 3].T[:, :, None, None]
    return np.stack([dx, dy, dz, oy * dz - oz * dy, oz * dx - ox * dz, ox * dy - oy * dx], axis=-1).astype(np.float32)

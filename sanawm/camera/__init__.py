"""Camera inputs without torch: pose and intrinsics files, action strings, the first-frame image, and what the model is fed."""

from sanawm.camera.actions import (
    DEFAULT_SCHEME,
    SCHEMES,
    ActionIntegrator,
    ActionScheme,
    actions_to_poses,
    choose_scheme,
    parse_actions,
    split_scheme,
)
from sanawm.camera.image import CropGeometry, load_image, resize_and_crop, to_model_range
from sanawm.camera.intrinsics import (
    adjust_for_resize_crop,
    check_field_of_view,
    default_intrinsics,
    load_intrinsics,
    normalise_intrinsics,
)
from sanawm.camera.pack import CameraChunk, CameraPacker, camera_conditions, chunk_plucker, frames_to_snap, latent_frames
from sanawm.camera.poses import check_poses, fit_length, load_poses, relative_to_first
from sanawm.camera.rays import ray_matrices
from sanawm.camera.rope import RopeTable, rope_grid, rope_time

__all__ = [
    "DEFAULT_SCHEME",
    "SCHEMES",
    "ActionIntegrator",
    "ActionScheme",
    "CameraChunk",
    "CameraPacker",
    "CropGeometry",
    "RopeTable",
    "actions_to_poses",
    "adjust_for_resize_crop",
    "camera_conditions",
    "check_field_of_view",
    "check_poses",
    "choose_scheme",
    "chunk_plucker",
    "default_intrinsics",
    "fit_length",
    "frames_to_snap",
    "latent_frames",
    "load_image",
    "load_intrinsics",
    "load_poses",
    "normalise_intrinsics",
    "parse_actions",
    "ray_matrices",
    "relative_to_first",
    "resize_and_crop",
    "rope_grid",
    "rope_time",
    "split_scheme",
    "to_model_range",
]

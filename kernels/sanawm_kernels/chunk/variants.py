"""Kernels around the blocks that the streaming model launches."""

from __future__ import annotations

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.chunk import plans
from sanawm_kernels.tokenwise.variants import KIND


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Transposes of maps and velocities, AdaLN rows, ray matrices and rotary tables, the caption's GELU, and the Euler step of each chunk length."""
    grid = (sizes.height, sizes.width)
    found = [plans.transpose(kind, KIND) for kind in (KIND, "fp32")]
    found += [plans.modulation_rows(KIND, sizes.timesteps), plans.ray_matrices(*grid), plans.gelu(KIND)]
    found += [plans.rope_table(*grid, sizes.rope_pairs, keep) for keep in (sizes.rope_pairs, sizes.camera_rope_pairs)]
    return found + [plans.euler_step(KIND, frames, sizes.tokens_per_frame) for frames in sizes.frames]

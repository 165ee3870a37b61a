"""Variants of the gated delta network that the streaming model launches."""

from __future__ import annotations

from itertools import product

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.gdn.plans import Problem, plan


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """Both branches of a block together: every chunk length, first or later chunk, read-only or committing."""
    found: dict[str, KernelVariant] = {}
    for frames, has_state, commit in product(sizes.frames, (False, True), (False, True)):
        problem = Problem(
            sizes.batch, sizes.heads, sizes.head_dim, frames, sizes.tokens_per_frame, (sizes.head_dim * sizes.tokens_per_frame) ** -0.5,
            has_state=has_state, commit=commit, clamp=sizes.rms_clamp, camera_carry=sizes.camera_conv_tail,
        )  # fmt: skip
        found |= {variant.name: variant for variant in plan(problem, target)}
    return list(found.values())

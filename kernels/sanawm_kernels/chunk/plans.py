"""How the kernels around the blocks are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import pointer

KERNELS = "sanawm_kernels.chunk.kernels"
FLAT = 1024


@cache
def transpose(kind: str, out: str) -> KernelVariant:
    """(R, C) in `kind` to (C, R) in `out`."""
    return KernelVariant(
        name=f"chunk.transpose.{kind}.{out}", kernel=f"{KERNELS}:transpose",
        signature={"x": f"*{kind}:16", "x_row": "i32", "out": f"*{out}:16", "R": "i32", "C": "i32"},
        constexprs={"B": 32}, grid=("cdiv(R, B)", "cdiv(C, B)", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def modulation_rows(kind: str, steps: int) -> KernelVariant:
    """Rows of a table of `steps` timesteps."""
    return KernelVariant(
        name=f"chunk.modulation_rows.k{steps}.{kind}", kernel=f"{KERNELS}:modulation_rows",
        signature={"timestep": "*fp32:16", "steps": "*fp32:16", "table": f"*{kind}:16", "out": f"*{kind}:16", "WIDTH": "i32:16"},
        constexprs={"K": steps, "B": FLAT}, grid=("cdiv(WIDTH, B)", "FRAMES", "1"), grid_sizes=("FRAMES",), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def ray_matrices(height: int, width: int) -> KernelVariant:
    """Ray matrices of a latent grid."""
    return KernelVariant(
        name=f"chunk.ray_matrices.{height}x{width}", kernel=f"{KERNELS}:ray_matrices",
        signature={"camera": "*fp32:16", "rays": "*fp32:16", "inverse": "*fp32:16"},
        constexprs={"H": height, "W": width, "B": 64}, grid=("cdiv(H * W, B)", "FRAMES", "1"), grid_sizes=("FRAMES",), num_warps=2, num_stages=1,
        # A fused multiply-add rounds differently from the definition, which matters where two terms cancel.
        options={"enable_fp_fusion": False},
    )  # fmt: skip


@cache
def rope_table(height: int, width: int, pairs: tuple[int, int, int], keep: tuple[int, int, int]) -> KernelVariant:
    """Tables of `pairs` pairs for time, rows and columns, of which the first `keep` enter."""
    total = sum(keep)
    pairs_name, keep_name = ("_".join(map(str, numbers)) for numbers in (pairs, keep))
    return KernelVariant(
        name=f"chunk.rope_table.{height}x{width}.{pairs_name}.keep_{keep_name}", kernel=f"{KERNELS}:rope_table",
        signature={"time": "*fp32:16", "rows": "*fp32:16", "columns": "*fp32:16", "out": "*fp32:16", "N": "i32"},
        constexprs={
            "H": height, "W": width, "P": pairs[0], "Q": pairs[1], "R": pairs[2], "K0": keep[0], "K1": keep[1], "K2": keep[2],
            "B": 16, "L": power_of_two(total),
        },
        grid=("cdiv(N, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def gelu(kind: str) -> KernelVariant:
    """Tanh GELU of a flat tensor."""
    return KernelVariant(
        name=f"chunk.gelu.{kind}", kernel=f"{KERNELS}:gelu", signature={"x": f"*{kind}:16", "out": f"*{kind}:16", "SIZE": "i32"},
        constexprs={"B": FLAT}, grid=("cdiv(SIZE, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def euler_step(kind: str, frames: int, tokens: int) -> KernelVariant:
    """One Euler step on latents of `frames` frames of `tokens` tokens."""
    return KernelVariant(
        name=f"chunk.euler_step.{frames}x{tokens}.{kind}", kernel=f"{KERNELS}:euler_step",
        signature={"latents": pointer(kind) or "", "velocity": pointer(kind) or "", "size": "fp32", "SIZE": "i32", "KEPT": "i32"},
        constexprs={"S": tokens, "T": frames, "B": FLAT}, grid=("cdiv(SIZE, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip

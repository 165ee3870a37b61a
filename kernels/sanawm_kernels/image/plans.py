"""How the image encoder's kernels are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache
from typing import Literal

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.conv.plans import tiling
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import arguments, pointer

KERNELS = "sanawm_kernels.image.kernels"
FLAT = 1024
Mode = Literal["plain", "residual", "latent"]
MODES: dict[Mode, int] = {"plain": 0, "residual": 1, "latent": 2}
Stride = tuple[int, int, int]
# (frames, rows, columns) by which each stage of the LTX-2 video encoder shrinks the video.
STRIDES: tuple[Stride, ...] = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))


@cache
def patches(kind: str, height: int, width: int, patch: int) -> KernelVariant:
    """Patches of a float32 image as pixels of a frame of `height` by `width`."""
    lanes = power_of_two(3 * patch**2, 16)
    return KernelVariant(
        name=f"image.patches.{height}x{width}.p{patch}.{kind}", kernel=f"{KERNELS}:patches",
        signature={"image": "*fp32:16", "out": f"*{kind}:16"},
        constexprs={"H": height, "W": width, "PATCH": patch, "P": lanes, "R": max(1, 2048 // lanes)},
        grid=("cdiv(H * W, R)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def frame_conv(kind: str, target: int, height: int, width: int, channels: int, out_channels: int, mode: Mode) -> KernelVariant:
    """3x3 convolution of a frame for compute capability `target`."""
    tuned, tiles = tiling(kind, target, channels, out_channels)
    statistics = "fp32" if mode == "latent" else None
    signature, absent = arguments({
        "x": pointer(kind), "weight": pointer(kind), "bias": pointer(kind), "residual": pointer(kind if mode == "residual" else None),
        "mean": pointer(statistics), "std": pointer(statistics), "out": pointer(kind),
    })  # fmt: skip
    sizes = {"H": height, "W": width, "C": channels, "N": out_channels, "MODE": MODES[mode]}
    return KernelVariant(
        name=f"image.conv.{height}x{width}.c{channels}.n{out_channels}.{mode}.{kind}", kernel=f"{KERNELS}:frame_conv",
        signature=signature, constexprs=absent | sizes | tiles | {"PRECISION": "ieee"},
        grid=("cdiv(H * W, BM) * cdiv(N, BN)", "1", "1"), num_warps=tuned.num_warps, num_stages=tuned.num_stages, hot=True,
    )  # fmt: skip


@cache
def downsample(kind: str, height: int, width: int, channels: int, made: int, stride: Stride) -> KernelVariant:
    """Space to depth by `stride` (frames, rows, columns) of a convolution's `made` channels, beside a skip of `channels` averaged ones.

    Raises ValueError where the frame or the channels do not divide.
    """
    if height % stride[1] or width % stride[2] or channels % made:
        raise ValueError(f"downsampling by {stride} does not divide {height}x{width} pixels or {channels} channels into {made}")
    return KernelVariant(
        name=f"image.downsample.{height}x{width}.c{channels}.n{made}.s{'x'.join(map(str, stride))}.{kind}", kernel=f"{KERNELS}:downsample",
        signature={"y": f"*{kind}:16", "x": f"*{kind}:16", "out": f"*{kind}:16", "SIZE": "i32"},
        constexprs={
            "H": height, "W": width, "C": channels, "N": made, "ST": stride[0], "SY": stride[1], "SX": stride[2],
            "G": channels // made, "B": FLAT,
        },
        grid=("cdiv(SIZE, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip

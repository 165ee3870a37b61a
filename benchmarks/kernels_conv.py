"""Convolutions of the video decoder, one steady latent frame at 704x1280, beside cuDNN; `--propose` times tiles for the tuning table."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_timing import Case, main, measure

from sanawm_kernels.conv import naive, plans
from sanawm_kernels.conv.plans import Config, Mode
from sanawm_kernels.gemm.table import MULTIPROCESSORS
from sanawm_kernels.tokenwise.launch import launch

# The architecture whose tiles are used; others have no rows for convolutions with descriptors.
TARGET = 90
PATCH = 4
WORKERS = 15


@dataclass(frozen=True)
class Shape:
    """A convolution: stage of the decoder, frames, rows, columns, channels in and out, epilogue."""

    stage: str
    frames: int
    height: int
    width: int
    channels: int
    made: int
    mode: Mode

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width

    @property
    def rows(self) -> int:
        """Rows of the result, those between the frames' rows too."""
        return self.frames * plans.frame_stride(self.height, self.width)

    @property
    def tile(self) -> Config:
        return plans.config("bf16", TARGET, self.channels, self.made, self.mode)


def shapes() -> Iterator[Shape]:
    """Every kind of convolution of the steady `decode` program."""
    yield Shape("in", 1, 22, 40, 128, 1024, "plain")
    for stage, channels in enumerate((1024, 512, 256, 128)):
        sizes = (str(stage), 2**stage, 22 * 2**stage, 40 * 2**stage, channels)
        yield Shape(*sizes, channels, "plain")
        yield Shape(*sizes, channels, "residual")
        yield Shape(*sizes, *((4 * channels, "upsample") if stage < 3 else (3 * PATCH**2, "pixels")))  # type: ignore[arg-type]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


class Operands:
    """Random padded frames, weights, and what is added."""

    def __init__(self, shape: Shape) -> None:
        T, H, W, C, N = shape.frames, shape.height, shape.width, shape.channels, shape.made
        self.shape = shape
        self.x, self.bias = rand(T + 2, H + 2, W + 2, C), rand(N)
        # Pixels are around zero and mostly within [-1, 1].
        self.weight = rand(N, 27 * C) * ((0.3 if shape.mode == "pixels" else 1.0) / (27 * C) ** 0.5)
        self.bias *= 0.1
        self.skip = rand(shape.rows, C) if shape.mode in ("residual", "upsample") else None
        self.select = naive.selection(N, C, shape.mode == "upsample").to(self.x) if self.skip is not None else None

    def conv(self, tile: Config) -> Callable[[], Tensor]:
        """The convolution in that tile; its result is a new tensor."""
        s = self.shape
        T, H, W, C, N = s.frames, s.height, s.width, s.channels, s.made
        variant = plans.described_conv("bf16", T, H, W, C, N, s.mode, False, tile, PATCH)
        given = {"x": self.x, "weight": self.weight, "bias": self.bias, "skip": self.skip, "select": self.select}
        sizes = (s.rows, N)
        if s.mode == "pixels":
            sizes = (s.pixels, N)
        elif s.mode == "upsample":
            sizes = (2 * T * plans.frame_stride(2 * H, 2 * W), C // 2)

        def call() -> Tensor:
            out = torch.empty(sizes, dtype=torch.uint8 if s.mode == "pixels" else torch.bfloat16, device="cuda")
            to = torch.empty(tile.splits, *sizes, device="cuda") if tile.splits > 1 else out
            launch(variant, {**given, "out": to}, SMS=MULTIPROCESSORS[TARGET])
            if tile.splits > 1:
                added = {} if self.skip is None else {"residual": self.skip}
                launch(plans.summed("bf16", s.rows, N, tile.splits, bool(added)), {"parts": to, "bias": self.bias, "out": out, **added})
            return out

        return call

    def library(self) -> Callable[[], Tensor]:
        """cuDNN's convolution of the same padded frames, without what comes after it."""
        x = self.x.permute(3, 0, 1, 2)[None]
        kernel = self.weight.reshape(-1, 3, 3, 3, self.shape.channels).permute(0, 4, 1, 2, 3)
        return lambda: F.conv3d(x, kernel, self.bias)

    def check(self, found: Tensor) -> None:
        """RuntimeError where a result is further from float32 than its rounding."""
        s = self.shape
        T, H, W = s.frames, s.height, s.width
        want = naive.padded_conv(self.x.float(), self.weight.float(), self.bias.float())
        skip = None if self.skip is None else naive.frames(self.skip, T, H, W, W + 2)
        if s.mode == "pixels":
            got, want = found.float() - 127.5, naive.pixels(want.bfloat16(), PATCH).reshape(found.shape).float() - 127.5
        elif s.mode == "upsample" and skip is not None:
            got, want = naive.frames(found, 2 * T, 2 * H, 2 * W, 2 * W + 2).float(), naive.upsampled(want, skip, False).float()
        else:
            got, want = naive.frames(found, T, H, W, W + 2).float(), want if skip is None else want + skip.float()
        error = float((got - want).norm() / want.norm())
        # Rounding to 8 bits is 0.0017 on average; a level of a pixel may be one off.
        if not error < 4e-3:
            raise RuntimeError(f"conv.{s.stage}.{s.mode}: relative error {error:.2e} against float32")


def _convolution(shape: Shape) -> Case:
    def prepare() -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
        operands = Operands(shape)
        call = operands.conv(shape.tile)
        operands.check(call())
        return call, {"cudnn": operands.library()}

    s = shape
    added = s.channels * s.pixels if s.mode in ("residual", "upsample") else 0
    frame = (s.height + 2) * (s.width + 2)
    traffic = 2 * ((s.frames + 2) * frame * s.channels + 27 * s.channels * s.made + added) + (1 if s.mode == "pixels" else 2) * s.pixels * s.made
    return Case(
        f"conv.{s.stage}.{s.mode}.bf16", prepare, traffic, 2 * s.pixels * s.made * 27 * s.channels, "bf16",
        "convolution of padded frames with its epilogue; the peer has no epilogue", TARGET,
    )  # fmt: skip


def _padded(shape: Shape) -> Case:
    T, H, W, C = shape.frames, shape.height, shape.width, shape.channels
    variant = plans.padded("bf16", T, H, W, C, False, True)

    def prepare() -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
        x, past = rand(shape.rows, C), rand(2, H, W, C)
        out, state = (torch.empty(frames, H + sides, W + sides, C, dtype=x.dtype, device="cuda") for frames, sides in ((T + 2, 2), (2, 0)))
        arguments = {"x": x, "past": past, "out": out, "state": state}

        def call() -> None:
            launch(variant, arguments)

        call()
        want = naive.padded(naive.norm_silu(naive.frames(x, T, H, W, W + 2)), past)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
        return call, {}

    traffic = 2 * C * (T * H * W + 4 * H * W + (T + 2) * (H + 2) * (W + 2))
    return Case(f"conv.{shape.stage}.padded.bf16", prepare, traffic, includes="norm, SiLU, two frames before, border, new state", needs=TARGET)


def cases() -> Sequence[Case]:
    """Every convolution, and the padding before those of residual blocks."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    return [*map(_convolution, shapes()), *(_padded(s) for s in shapes() if s.mode == "residual")]


def candidates(shape: Shape) -> list[Config]:
    """Tiles worth timing, the table's first."""
    two = [Config(128, 128, 64, slices=n, warps=4, stages=3, persistent=2) for n in (2, 4)]
    wide, tall = Config(128, 256, 64, slices=4), Config(256, 128, 64, slices=2)
    square = Config(128, 128, 64, stages=5)
    if shape.mode == "pixels":
        few = Config(256, 64, 64, slices=2)
        small = Config(128, 64, 64, warps=4, persistent=2)
        found = [few, replace(few, stages=5), replace(few, slices=1), replace(few, warps=4), small, replace(small, stages=3)]
    elif shape.made == 128:
        deep = Config(256, 128, 128, slices=4, stages=2)
        found = [tall, replace(tall, slices=4), replace(tall, stages=3), deep, replace(deep, rows=128, stages=3), square, *two]
    elif (shape.channels, shape.made) == (1024, 1024):
        found = [replace(wide, splits=4), replace(tall, splits=4, slices=4), replace(wide, splits=3), replace(square, splits=2, slices=2)]
        found += [replace(two[1], splits=n) for n in (2, 4)]
        found += [replace(wide, splits=4, group=g) for g in (1, 2)]
    elif shape.stage == "in":
        found = [square, replace(square, splits=2), *two, wide]
    else:
        # All tiles of a narrow result are in work at once.
        groups = (8,) if shape.made <= 512 else (4, 8, 32)
        found = [replace(c, group=g) for c in (wide, tall, square, two[0]) for g in groups]
        found += [replace(wide, stages=3), replace(tall, slices=4), replace(wide, depth=128, stages=2)]
    return list(dict.fromkeys((shape.tile, *found)))


def warm(job: tuple[Shape, Config]) -> str | None:
    """Compile a candidate into Triton's cache and check it; the error where it does not run."""
    shape, tile = job
    torch.backends.cudnn.allow_tf32 = False
    try:
        operands = Operands(shape)
        operands.check(operands.conv(tile)())
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def propose() -> None:
    """Print the times of every shape's candidates, the fastest first, and which one the table has."""
    jobs = [(shape, tile) for shape in shapes() for tile in candidates(shape)]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        failed = dict(zip(jobs, pool.map(warm, jobs), strict=True))
    for shape in shapes():
        operands, times = Operands(shape), []
        for tile in candidates(shape):
            if failed[shape, tile]:
                print(f"    {tile}: {failed[shape, tile]}")
            else:
                times.append((measure(operands.conv(tile), 50).median, tile))
        print(f"conv.{shape.stage}.{shape.mode}: cudnn {measure(operands.library(), 50).median:.1f} us", flush=True)
        for time, tile in sorted(times, key=lambda entry: entry[0]):
            print(f"    {time:8.1f} us {'*' if tile == shape.tile else ' '} {tile}", flush=True)


if __name__ == "__main__":
    main("kernels-conv", cases, "convolutions of the decoder, one steady latent frame at 704x1280, random inputs; * marks the table's tile", propose)

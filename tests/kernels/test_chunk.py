"""Kernels around the blocks against their plain definitions, in Triton's interpreter (float32) or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sanawm_kernels.chunk import naive, plans
from sanawm_kernels.tokenwise.launch import launch

# One or two float32 roundings.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


@pytest.mark.parametrize("shape", [(24, 70), (70, 24), (33, 1)])
def test_transpose(shape: tuple[int, int]) -> None:
    x = random(shape[0], shape[1] + 3)[:, : shape[1]]  # rows that are not adjacent
    out = empty(shape[1], shape[0])
    launch(plans.transpose("fp32", "fp32"), {"x": x, "x_row": x.stride(0), "out": out, "R": shape[0], "C": shape[1]})
    torch.testing.assert_close(out, x.t(), rtol=0, atol=0)


def test_modulation_rows() -> None:
    steps, table = torch.tensor([1000.0, 960, 889, 727, 0]), random(5, 1104)
    # Truncated to integers as in training; 500 is none of the steps.
    timestep = torch.tensor([0.0, 889.7, 500, 1000])
    out = empty(4, 1104)
    launch(plans.modulation_rows("fp32", 5), {"timestep": timestep, "steps": steps, "table": table, "out": out, "WIDTH": 1104}, FRAMES=4)
    torch.testing.assert_close(out, naive.modulation_rows(timestep, steps, table), rtol=0, atol=0, equal_nan=True)
    assert out[2].isnan().all()
    torch.testing.assert_close(out[1], table[2], rtol=0, atol=0)


def test_ray_matrices() -> None:
    camera = torch.zeros(3, 20)
    for t in range(3):
        rotation = torch.linalg.qr(random(3, 3, seed=t)).Q
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, 5 * random(3, seed=10 + t)
        camera[t, :16] = pose.reshape(-1)
        camera[t, 16:] = torch.tensor([7.0, 8.0, 4.5, 2.0])
    camera[2, 16] = torch.nan  # a ray that is not finite gets the identity
    want = naive.ray_matrices(camera.double(), 5, 9)
    rays, inverse = empty(135, 4, 4), empty(135, 4, 4)
    launch(plans.ray_matrices(5, 9), {"camera": camera, "rays": rays, "inverse": inverse}, FRAMES=3)
    for got, exact in ((rays, want[0]), (inverse, want[1])):
        # Unit vectors and offsets of size 10 in float32.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)
    torch.testing.assert_close(rays[90:], torch.eye(4).expand(45, 4, 4), rtol=0, atol=0)


def test_rope_table() -> None:
    time, rows, columns = random(3, 8), random(5, 4, seed=1), random(7, 4, seed=2)
    for keep in ((8, 4, 4), (4, 2, 2)):
        out = empty(105, sum(keep))
        launch(plans.rope_table(5, 7, (8, 4, 4), keep), {"time": time, "rows": rows, "columns": columns, "out": out, "N": 105})
        torch.testing.assert_close(out, naive.rope_table(time, rows, columns, keep), rtol=0, atol=0)


def test_gelu() -> None:
    x = torch.cat((random(1500) * 3, torch.tensor([0.0, -30, 30])))
    out = empty(1503)
    launch(plans.gelu("fp32"), {"x": x, "out": out, "SIZE": 1503})
    torch.testing.assert_close(out, naive.gelu(x), **CLOSE)


@pytest.mark.parametrize("kept", [0, 1])
def test_euler_step(kept: int) -> None:
    x, v = random(6, 4, 35), random(6, 4, 35, seed=1)
    want = naive.euler_step(x, v, 0.071, bool(kept))
    got = x.clone()
    launch(plans.euler_step("fp32", 4, 35), {"latents": got, "velocity": v, "size": 0.071, "SIZE": got.numel(), "KEPT": kept})
    torch.testing.assert_close(got, want, **CLOSE)
    if kept:
        assert torch.equal(got[:, 0], x[:, 0])

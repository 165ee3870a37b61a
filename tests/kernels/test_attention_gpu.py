"""Both branches' attention in one launch and its completion on a GPU with Hopper's instructions, against float64 (`-m gpu`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sanawm_kernels.attention import naive, plans, table
from sanawm_kernels.attention import triton as fused
from sanawm_kernels.attention.naive import InverseUCPE, Segment
from sanawm_kernels.quant.formats import Fp8Tensor
from sanawm_kernels.quant.interpreter import poisoned
from sanawm_kernels.quant.request import Output, Quantize
from sanawm_kernels.tokenwise import naive as tokenwise

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="instructions of compute capability 9.0")]
# The table's settings, and others that it may come to hold.
TILES = [None, table.PairTile(2, 128, 3, 2, False, False), table.PairTile(3, 64, 4, 4, False, True), table.PairTile(3, 64, 4, 3, True, False)]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape) + seed)).bfloat16()


class Problem:
    """Queries and segments of both branches, the current chunk's values inside a wider projection, and the camera's transform."""

    def __init__(self, N: int, H: int, D: int, lengths: tuple[int, ...]) -> None:
        self.scales = (D**-0.5, 0.9 * D**-0.5)
        self.queries = [2 * rand(N, H, D, seed=i) for i in range(2)]
        self.held = []
        for branch in range(2):
            segments = [Segment(rand(n, H, D, seed=10 * i + branch), rand(n, H, D, seed=10 * i + branch + 5)) for i, n in enumerate(lengths)]
            wider = rand(lengths[-1], 3 * H * D, seed=90 + branch)
            segments[-1] = Segment(segments[-1].keys, wider[:, H * D : 2 * H * D].unflatten(1, (H, D)))
            self.held.append(segments)
        angle = rand(N, D // 4, seed=71).float()
        self.ucpe = InverseUCPE(rand(1, N, 4, 4, seed=70).float(), angle.cos(), angle.sin())

    def run(self, quantize: Quantize | None = None, tile: table.PairTile | None = None) -> tuple[torch.Tensor, Output]:
        (q, cam_q), (held, cam_held), (scale, cam_scale) = self.queries, self.held, self.scales
        return fused.window_pair(q, held, scale, cam_q, cam_held, cam_scale, self.ucpe, quantize=quantize, tile=tile)

    def errors(self, tile: table.PairTile | None = None) -> list[float]:
        """Largest relative errors of a head's output, main and camera."""
        main, camera = self.run(tile=tile)
        assert camera.plain is not None
        wide = InverseUCPE(self.ucpe.rays.double(), self.ucpe.cos.double(), self.ucpe.sin.double())
        H, found = self.queries[0].shape[1], []
        for branch, (out, ucpe) in enumerate(((main, None), (camera.plain, wide))):
            worst = 0.0
            for h in range(H):
                q = self.queries[branch][None, :, h : h + 1].double()
                segments = [Segment(*(x[None, :, h : h + 1].double() for x in (s.keys, s.values))) for s in self.held[branch]]
                right = naive.window_attention(q, segments, self.scales[branch], ucpe=ucpe).plain
                assert right is not None
                got = out.unflatten(1, (H, -1))[:, h].double()
                worst = max(worst, float((got - right[0]).norm() / right[0].norm()))
            found.append(worst)
        return found


# Probabilities and the output are rounded to bfloat16, 2^-8 relative each at most, averaged over keys; the camera's output is rounded twice.
BOUNDS = (4e-3, 5e-3)


def right(found: list[float]) -> bool:
    return all(error < bound for error, bound in zip(found, BOUNDS))


@pytest.mark.parametrize("lengths", [(3520,), (3520, 2640)])
def test_first_chunks(lengths: tuple[int, ...]) -> None:
    found = Problem(lengths[-1], 20, 112, lengths).errors()
    assert right(found), found


# Tiles that are all divided; rows that fill no tile; segments under, at and over a block; other widths of a head.
@pytest.mark.parametrize(("N", "H", "D", "lengths"), [
    (2640, 20, 112, (1, 65, 880)), (880, 20, 112, (880,)), (701, 20, 112, (65, 1)), (1, 1, 112, (1,)), (65, 3, 112, (128, 64, 129)),
    (240, 4, 32, (120, 240)), (333, 24, 128, (333, 40)), (333, 40, 80, (65,)),
])  # fmt: skip
def test_odd_sizes(N: int, H: int, D: int, lengths: tuple[int, ...]) -> None:
    found = Problem(N, H, D, lengths).errors()
    assert right(found), found


@pytest.mark.parametrize("tile", TILES)
def test_settings_are_right_and_repeat_to_the_bit(tile: table.PairTile | None) -> None:
    problem = Problem(2640, 20, 112, (3520, 2640, 2640))
    first, found = problem.run(tile=tile), problem.errors(tile)
    assert right(found), found
    for _ in range(5):
        again = problem.run(tile=tile)
        assert torch.equal(first[0], again[0])
        assert first[1].plain is not None and again[1].plain is not None and torch.equal(first[1].plain, again[1].plain)


def test_sums_that_are_too_large_are_computed_again() -> None:
    """Logits of some queries exceed the first block's by more than float32 holds as a power, in whole and in divided tiles."""
    problem = Problem(2640, 20, 112, (880, 2640))
    for q, segments in zip(problem.queries, problem.held):
        for row in (0, 700, 2600):
            key = segments[-1].keys[row]
            key.copy_(400 * 112**0.5 * q[row].float() / q[row].float().square().sum(-1, keepdim=True))
    found = problem.errors()
    assert right(found), found


@pytest.mark.parametrize("keep", [True, False])
def test_the_camera_branch_is_quantized(keep: bool) -> None:
    problem = Problem(2640, 20, 112, (3520, 2640))
    plain = problem.run()[1].plain
    scale = torch.tensor(0.0173, device="cuda")
    out = problem.run(Quantize("fp8", scale, keep=keep))[1]
    assert plain is not None and (out.plain is not None) == keep and isinstance(out.quantized, Fp8Tensor)
    wanted = tokenwise.quantize_activations(plain, Quantize("fp8", scale)).quantized
    assert isinstance(wanted, Fp8Tensor)
    different = out.quantized.dequantize(torch.float64) != wanted.dequantize(torch.float64)
    # A reciprocal product may meet a tie.
    assert float(different.double().mean()) < 1e-4


@pytest.mark.parametrize(("N", "L", "present"), [(2640, 300, 240), (2640, 300, 7), (61, 17, 17), (130, 128, 100), (129, 129, 129), (64, 320, 0)])
def test_cross_attention_with_roles(N: int, L: int, present: int) -> None:
    """Blocks of keys that end within one, masks that leave whole blocks out or everything, tiles of queries that overhang."""
    H, D = 20, 112
    q, weight = 3 * rand(1, N, H * D), rand(H * D, seed=1)
    k, v = rand(1, L, H, D, seed=2), rand(1, L, H, D, seed=3)
    mask = torch.zeros(1, L, dtype=torch.bool, device="cuda")
    mask[0, torch.randperm(L, device="cuda")[:present]] = True
    squares = torch.nn.functional.pad(q.float().square(), (0, -H * D % 128)).unflatten(2, (-1, 128)).sum(3)
    assert plans.roles_fit(90, "bf16", D, L, squares.shape[2], None, 1)
    out = fused.cross_attention(q, k, v, mask, weight, 1e-6, squares=squares.contiguous()).plain
    again = fused.cross_attention(q, k, v, mask, weight, 1e-6, squares=squares.contiguous()).plain
    wanted = naive.cross_attention(q.double(), k.double(), v.double(), mask, weight.double(), 1e-6).plain
    assert out is not None and again is not None and wanted is not None and torch.equal(out, again)
    if present == 0:
        assert not out.any()
    else:
        # Queries, probabilities and outputs are rounded to bfloat16, 2^-9 relative each on average less.
        assert float((out.double() - wanted).norm() / wanted.norm()) < 6e-3

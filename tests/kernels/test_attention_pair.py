"""Both branches' attention: `finish_pair` in the interpreter, after a stand-in for `window_pair`, which the interpreter cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.attention import naive, plans, table
from sanawm_kernels.attention import triton as fused
from sanawm_kernels.attention.naive import InverseUCPE, Segment
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor
from sanawm_kernels.quant.interpreter import exact, poisoned
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive as tokenwise

HALF_ULP = 2.0**-8
LOG2_E = 1.4426950408889634


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs and scratch memory begin as NaN; the first launch is replaced by `attend`."""
    launch = fused.launch

    def replaced(variant: KernelVariant, arguments: Mapping[str, Any], **sizes: int) -> None:
        if not variant.kernel.endswith(":window_pair"):
            return launch(variant, arguments, **sizes)
        assert set(variant.signature) <= set(arguments)
        attend(variant.constexprs, {name: arguments[name] for name in variant.signature})

    monkeypatch.setattr(fused, "launch", replaced)
    with poisoned(), exact():
        yield


def attend(c: Mapping[str, Any], a: Mapping[str, Any]) -> None:
    """What `window_pair` writes, and nothing else: probabilities relative to the first block's maxima, parts of blocks."""
    N, H, D = a["main_q"].shape
    lengths = [a[f"n{i}"] for i in range(3) if f"n{i}" in a]
    blocks = [(i, at) for i, n in enumerate(lengths) for at in range(0, n, c["BN"])]
    rows = -(-N // c["BM"])
    whole = rows * H // a["programs"] * a["programs"]
    assert a["parts"].shape == (2, max(rows * H - whole, 1), c["PARTS"], c["BM"], D)
    for b, branch in enumerate(("main", "camera")):
        for tile in range(rows * H):
            head, first = divmod(tile, rows)
            these = slice(first * c["BM"], min((first + 1) * c["BM"], N))
            q = a[f"{branch}_q"][these, head].double() * (a[f"{branch}_scale"] * LOG2_E)
            made = []
            for i, at in blocks:
                k, v = (a[f"{branch}_{x}{i}"][at : at + c["BN"], head].double() for x in "kv")
                logits = q @ k.T
                m = logits.amax(1, keepdim=True) if not made else m  # noqa: F821
                p = (logits - m).exp2().float()
                made.append((p.sum(1), p @ v.float()))
            if tile < whole:
                total, acc = (sum(block[i] for block in made) for i in range(2))
                a["sums"][b, head, these] = total
                out = a["main_out" if b == 0 else "seen"]
                out[these, head * D : head * D + D] = (acc / total[:, None]).bfloat16()
                continue
            for part in range(c["PARTS"]):
                mine = made[part * len(made) // c["PARTS"] : (part + 1) * len(made) // c["PARTS"]]
                zero = (torch.zeros(len(q)), torch.zeros(len(q), D))
                a["part_sums"][b, tile - whole, part, : len(q)] = sum((block[0] for block in mine), zero[0])
                a["parts"][b, tile - whole, part, : len(q)] = sum((block[1] for block in mine), zero[1])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).bfloat16()


def problem(N: int, H: int, D: int, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], list[list[Segment]], InverseUCPE]:
    """Queries and segments of both branches, the last segment's values inside a wider projection, and the camera's transform."""
    queries = [rand(N, 3 * H * D, seed=i)[:, H * D : 2 * H * D].unflatten(1, (H, D)) for i in range(2)]
    held = []
    for branch in range(2):
        segments = [Segment(rand(n, H, D, seed=10 * i + branch), rand(n, H, D, seed=10 * i + branch + 5)) for i, n in enumerate(lengths)]
        wider = rand(lengths[-1], 2 * H * D + 16, seed=90 + branch)
        segments[-1] = Segment(segments[-1].keys, wider[:, H * D : 2 * H * D].unflatten(1, (H, D)))
        held.append(segments)
    angle = rand(N, D // 4, seed=71).float()
    return queries, held, InverseUCPE(rand(1, N, 4, 4, seed=70).float(), angle.cos(), angle.sin())


def wanted(queries: list[torch.Tensor], held: list[list[Segment]], ucpe: InverseUCPE | None, branch: int) -> torch.Tensor:
    segments = [Segment(s.keys[None].double(), s.values[None].double()) for s in held[branch]]
    wide = None if ucpe is None else InverseUCPE(ucpe.rays.double(), ucpe.cos.double(), ucpe.sin.double())
    D = queries[0].shape[-1]
    out = naive.window_attention(queries[branch][None].double(), segments, (1 - 0.1 * branch) * D**-0.5, ucpe=wide).plain
    assert out is not None
    return out[0]


def run(queries: list[torch.Tensor], held: list[list[Segment]], ucpe: InverseUCPE, quantize: Quantize | None = None) -> tuple[torch.Tensor, Any]:
    D = queries[0].shape[-1]
    return fused.window_pair(queries[0], held[0], D**-0.5, queries[1], held[1], 0.9 * D**-0.5, ucpe, quantize=quantize)


def check(queries: list[torch.Tensor], held: list[list[Segment]], ucpe: InverseUCPE, rounded: float = 0.0) -> None:
    """`rounded`: what probabilities lose as an operand of the second product."""
    main, camera = run(queries, held, ucpe)
    right = wanted(queries, held, None, 0)
    assert bool(((main.double() - right).abs() <= HALF_ULP * right.abs() + (1e-6 + rounded) * right.abs().amax(1, keepdim=True)).all())
    right = wanted(queries, held, ucpe, 1)
    # What the camera branch sees is rounded once, and then what four channels of it give.
    seen = wanted(queries, held, None, 1).abs().amax(1, keepdim=True)
    size = ucpe.rays[0].double().abs().sum(-1).amax(-1)[:, None].clamp(min=2)
    error = (camera.plain.double() - right).abs()
    assert bool((error <= HALF_ULP * right.abs() + (HALF_ULP + rounded) * size * seen).all())


# On four programs, two a branch: all tiles whole; the last of three or nine divided; all divided. Rows and keys that fill no tile or block.
@pytest.mark.parametrize(("N", "H", "D", "lengths"), [
    (256, 1, 112, (65, 256)), (300, 1, 112, (40, 31, 34)), (300, 3, 32, (33,)), (40, 1, 112, (1, 7)), (5, 1, 16, (1,)),
])  # fmt: skip
def test_whole_and_divided_tiles(N: int, H: int, D: int, lengths: tuple[int, ...]) -> None:
    check(*problem(N, H, D, lengths))


# Groups of two and four heads: two tiles of twelve divided, both of the last head; one of six; five of eighteen, of two heads of a group.
@pytest.mark.parametrize(("N", "H", "processors"), [(300, 4, 10), (300, 2, 10), (290, 6, 26)])
def test_groups_whose_last_heads_are_divided(N: int, H: int, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "multiprocessors", lambda device: processors)
    check(*problem(N, H, 32, (40, 31)))


def test_one_head_of_a_group_is_computed_again() -> None:
    """In the main branch the second head of four, in the camera branch the third."""
    queries, held, ucpe = problem(140, 4, 32, (40, 31))
    for head, q, segments in zip((1, 2), queries, held):
        segments[-1].keys[4, head] = 400 * 32**0.5 * q[70, head].float() / q[70, head].float().square().sum()
    check(queries, held, ucpe, HALF_ULP)


@pytest.mark.parametrize(("N", "lengths"), [(300, (40, 34)), (256, (33,))])
def test_sums_that_are_too_large_are_computed_again(N: int, lengths: tuple[int, ...]) -> None:
    """The last keys' logits of the first and last query exceed the first block's by more than float32 holds as a power."""
    queries, held, ucpe = problem(N, 1, 112, lengths)
    for q, segments in zip(queries, held):
        for row in (0, -1):
            key = segments[-1].keys[row - 1]
            key.copy_(400 * 112**0.5 * q[row].float() / q[row].float().square().sum(-1, keepdim=True))
    check(queries, held, ucpe, HALF_ULP)


def test_nan_stays_in_its_row() -> None:
    queries, held, ucpe = problem(300, 1, 32, (40,))
    for q in queries:
        q[7] = q[290] = torch.nan
    main, camera = run(queries, held, ucpe)
    for out in (main, camera.plain):
        broken = out.isnan()
        assert bool(broken[[7, 290]].all()) and int(broken.any(1).sum()) == 2


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_the_camera_branch_is_quantized(kind: str, heads: int, keep: bool) -> None:
    given = problem(300, heads, 48, (40, 31))
    layout = "swizzled" if kind == "nvfp4" else "rows"
    scale = torch.tensor(0.001 if kind == "nvfp4" else 0.01)
    out = run(*given, Quantize(kind, scale, layout=layout, keep=keep))[1]  # type: ignore[arg-type]
    assert (out.plain is not None) == keep
    plain = run(*given)[1].plain
    assert out.plain is None or torch.equal(out.plain, plain)
    right = tokenwise.quantize_activations(plain, Quantize(kind, scale, layout=layout)).quantized  # type: ignore[arg-type]
    got = out.quantized
    if isinstance(right, Nvfp4Tensor):
        assert isinstance(got, Nvfp4Tensor)
        valid = right.scales.view(torch.uint8) != 0  # the swizzled layout's padding is nobody's
        assert torch.equal(got.scales.view(torch.uint8)[valid], right.scales.view(torch.uint8)[valid])
        # A reciprocal product may meet a tie.
        assert int((got.packed != right.packed).sum()) <= 2
    else:
        assert isinstance(got, Fp8Tensor) and isinstance(right, Fp8Tensor)
        assert torch.equal(got.values.view(torch.uint8), right.values.view(torch.uint8))


def test_parts_of_a_plan_and_of_a_launch_are_the_same() -> None:
    """At the official size 16 of 280 tiles a branch are divided among 66 programs, each into four."""
    tile = table.pair_tile(90)
    shapes = plans.pair_scratch(2640, 20, 112, tile, 66)
    assert shapes["parts"] == ((2, 16, 4, 192, 112), "float32")
    variant = plans.window_pair(20, 112, 3, tile)
    assert variant.launch_grid({"programs": 66}) == (132, 1, 1)
    assert plans.finish_pair(20, 112, 3, tile).launch_grid({"N": 2640}) == (165, 5, 1)


def test_wrong_inputs_are_refused() -> None:
    queries, held, ucpe = problem(8, 2, 32, (40, 31))
    with pytest.raises(ValueError, match="as long in both branches"):
        run(queries, [held[0], held[1][:1]], ucpe)
    with pytest.raises(ValueError, match="expected a dtype of bf16"):
        run([q.float() for q in queries], held, ucpe)
    odd = rand(8, 2 * 32 + 4)[:, :64].unflatten(1, (2, 32))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        run([odd, queries[1]], held, ucpe)
    with pytest.raises(ValueError, match="expected shape"):
        run([queries[0], queries[1][:5]], held, ucpe)

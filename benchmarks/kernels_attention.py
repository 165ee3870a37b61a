"""Window attention and cross-attention of one block against torch's scaled-dot-product backends; `--propose` times tiles."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_timing import Case, main, measure

from sanawm_kernels.attention import triton as fused
from sanawm_kernels.attention.naive import Fp8Scales, InverseUCPE, Segment
from sanawm_kernels.attention.table import PairTile, Tile, paired
from sanawm_kernels.quant.formats import quantize_fp8
from sanawm_kernels.tokenwise import triton as tokenwise
from sanawm_kernels.tokenwise.launch import target

T, S, C, H, D, L = 3, 880, 2240, 20, 112, 300
N = T * S
WINDOWS = {"first": (3520,), "second": (3520, N), "window": (3520, N, N)}
Made = tuple[Callable[[], Any], dict[str, Callable[[], Any]]]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Callable[[], Any]]:
    """Torch's backends on concatenated keys; the concatenation is not timed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found: dict[str, Callable[[], Any]] = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):

        def call(backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=D**-0.5)

        try:
            call()
        except RuntimeError as error:
            print(f"{name}: not available here ({str(error).splitlines()[0]})")
            continue
        found[name] = call
    return found


def segments(lengths: Sequence[int]) -> list[Segment]:
    caches = [Segment(rand(1, n, H, D), rand(1, n, H, D)) for n in lengths[:-1]]
    values = rand(1, lengths[-1], 3 * C)[..., C : 2 * C].unflatten(-1, (H, D))
    return [*caches, Segment(rand(1, lengths[-1], H, D), values)]


def ray_space(tokens: int) -> InverseUCPE:
    angle = torch.randn(tokens, D // 4, device="cuda")
    return InverseUCPE(torch.randn(1, tokens, 4, 4, device="cuda"), angle.cos(), angle.sin())


def _branch(q: torch.Tensor, held: Sequence[Segment]) -> tuple[torch.Tensor, list[Segment]]:
    """One batch of queries and segments without their first axis."""
    return q[0], [Segment(s.keys[0], s.values[0]) for s in held]


def _window(name: str) -> Case:
    """Both branches, together where the table says so."""
    lengths = WINDOWS[name]
    queries, keys = lengths[-1], sum(lengths)

    def prepare() -> Made:
        main_q, camera_q = rand(1, queries, H, D), rand(1, queries, H, D)
        first, second, ucpe = segments(lengths), segments(lengths), ray_space(queries)
        joined = [torch.cat([getattr(s, field) for s in held], 1) for field in ("keys", "values") for held in (first, second)]
        others = peers(torch.cat((main_q, camera_q), 2), torch.cat(joined[:2], 2), torch.cat(joined[2:], 2))
        if paired(target(main_q.device), "bf16"):
            (q, held), (cam_q, cam_held) = _branch(main_q, first), _branch(camera_q, second)
            return lambda: fused.window_pair(q, held, D**-0.5, cam_q, cam_held, D**-0.5, ucpe), others

        def call() -> None:
            fused.window_attention(main_q, first, D**-0.5)
            fused.window_attention(camera_q, second, D**-0.5, ucpe=ucpe)

        return call, others

    includes = "both branches, camera with its transform out of ray space; the peers without it, all heads in one call, keys concatenated before"
    return Case(f"attention.{name}.bf16", prepare, 4 * C * (2 * queries + 2 * keys), 8 * queries * keys * C, "bf16", includes)


def _one_branch() -> Case:
    lengths = WINDOWS["window"]
    keys = sum(lengths)

    def prepare() -> Made:
        q, held = rand(1, N, H, D), segments(lengths)
        joined = [torch.cat([getattr(s, field) for s in held], 1) for field in ("keys", "values")]
        return lambda: fused.window_attention(q, held, D**-0.5), peers(q, *joined)

    return Case("attention.window.one_branch.bf16", prepare, 2 * C * (2 * N + 2 * keys), 4 * N * keys * C, "bf16", "one launch")


def _window_fp8() -> Case:
    lengths = WINDOWS["window"]

    def prepare() -> Made:
        scale = torch.tensor(0.02, device="cuda")
        q = quantize_fp8(rand(1, N, H, D), scale).values
        held = [Segment(quantize_fp8(s.keys, scale).values, tokenwise.fp8_values_transposed(s.values, scale)) for s in segments(lengths)]
        scales, ucpe = Fp8Scales(scale, scale, scale), ray_space(N)

        def call() -> None:
            fused.window_attention(q, held, D**-0.5, fp8=scales, dtype=torch.bfloat16)
            fused.window_attention(q, held, D**-0.5, fp8=scales, dtype=torch.bfloat16, ucpe=ucpe)

        return call, {}

    keys = sum(lengths)
    return Case(
        "attention.window.fp8", prepare, 2 * C * (3 * N + 2 * keys), 8 * N * keys * C, "fp8", "2 launches, quantized caches given", 89
    )


def _cross(parts: int) -> Case:
    def prepare() -> Made:
        q, weight, mask = rand(1, N, C), rand(C), torch.arange(L, device="cuda")[None] < 120
        kv = rand(1, L, 2 * C)
        k, v = (kv[..., i * C : (i + 1) * C].unflatten(-1, (H, D)) for i in range(2))
        squares = q.float().view(1, N, parts, -1).square().sum(-1) if parts else None
        return lambda: fused.cross_attention(q, k, v, mask, weight, 1e-6, squares=squares), peers(
            q.unflatten(-1, (H, D)), k, v, mask[:, None, None, :]
        )

    includes = "query norm and attention; the peers without the norm" + (", squares given" if parts else "")
    return Case(f"attention.cross.{'squares' if parts else 'norm'}.bf16", prepare, 2 * C * (2 * N + 2 * L), 4 * N * L * C, "bf16", includes)


def cases() -> Sequence[Case]:
    """Both branches over the window of each chunk kind, one branch alone, FP8, and cross-attention."""
    return [_window("window"), _one_branch(), _window("first"), _window("second"), _window_fp8(), _cross(20), _cross(0)]


# Blocks of keys and stages that fit beside the queries of two or three consumers.
PAIRS = [(2, 128, 2), (2, 128, 3), (2, 64, 4), (2, 64, 6), (3, 64, 4), (3, 64, 5)]


def propose() -> None:
    """Time tiles of the steady window, fastest first: both branches together, and one branch alone."""
    import triton

    q, held, ucpe = rand(1, N, H, D), segments(WINDOWS["window"]), ray_space(N)
    rows, cached = _branch(q, held)
    tiles: dict[str, list[Any]] = {"window": [Tile(*sizes) for sizes in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]}
    calls: dict[str, Callable[[Any], Any]] = {"window": lambda tile: fused.window_attention(q, held, D**-0.5, tile=tile)}
    if paired(target(q.device), "bf16"):
        tiles["pair"] = [PairTile(*sizes, *more) for sizes, *more in product(PAIRS, (2, 3, 4), (False, True), (False, True))]
        calls["pair"] = lambda tile: fused.window_pair(rows, cached, D**-0.5, rows, cached, D**-0.5, ucpe, tile=tile)
    for name, call in calls.items():
        times = []
        for tile in tiles[name]:
            try:
                times.append((measure(lambda tile=tile, call=call: call(tile)).median, tile))  # type: ignore[misc]
            except triton.runtime.errors.OutOfResources:
                continue
        for time, tile in sorted(times, key=lambda entry: entry[0])[:5]:
            print(f"{datetime.date.today().isoformat()} {torch.cuda.get_device_name()} {name} {time:.1f} us {tile}")


if __name__ == "__main__":
    main(
        "kernels-attention",
        cases,
        "attention of one block, 3 frames at 704x1280 over sink, previous and current chunk, random inputs",
        propose,
    )

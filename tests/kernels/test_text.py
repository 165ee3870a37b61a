"""The text encoder's kernels against their plain definitions in float64, in Triton's interpreter (float32)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sanawm_kernels.text import naive, plans
from sanawm_kernels.tokenwise.launch import launch

EPS32 = torch.finfo(torch.float32).eps


def random(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:: max(1, x.numel() // 7)] *= 20  # outliers
    return x


def empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def close(got: Tensor, want: Tensor, roundings: float) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= roundings * EPS32 * float(want.abs().max())


@pytest.mark.parametrize("channels", [64, 40])
def test_embedding(channels: int) -> None:
    table, gain = random(50, channels), 1 + 0.1 * random(channels, seed=1)
    ids = torch.tensor([3, 0, 49, 3, 17])
    stream, out = empty(5, channels), empty(5, channels)
    arguments = {"ids": ids, "table": table, "gain": gain, "updated": stream, "out": out, "scale": channels**0.5}
    launch(plans.embed_rows("fp32", channels), arguments, ROWS=5)
    want = naive.embed(ids, table.double(), channels**0.5, gain.double(), plans.NORM_EPS)
    close(stream, want[0], 2)
    # A sum of squares in another order, a root, a division and three products.
    close(out, want[1], 8)


@pytest.mark.parametrize("keep", [True, False])
def test_sum_of_normed_branch(keep: bool) -> None:
    C = 72
    x, branch = random(9, C), 1e3 * random(9, C, seed=1)
    x[4], branch[4] = 0, 0
    post, pre = 1 + 0.1 * random(C, seed=2), 1 + 0.1 * random(C, seed=3)
    stream, out = empty(9, C), empty(9, C)
    arguments = {"x": x, "branch": branch, "post": post, "pre": pre, "out": out} | ({"updated": stream} if keep else {})
    launch(plans.add_normed("fp32", C, keep), arguments, ROWS=9)
    want = naive.add_normed(*(t.double() for t in (x, branch, post, pre)), plans.NORM_EPS)
    # As above, twice in a row.
    close(out, want[1], 16)
    if keep:
        close(stream, want[0], 8)


@pytest.mark.parametrize(("heads", "D"), [(3, 16), (2, 24)])
def test_rotary_halves(heads: int, D: int) -> None:
    L = 37
    x = random(L, heads * D + 8)[:, : heads * D]  # rows that are not adjacent
    frequencies = plans.ROPE_THETA ** -(torch.arange(D // 2) / (D // 2))
    out = empty(L, heads * D)
    variant = plans.rotate_halves("fp32", heads, D)
    launch(variant, {"x": x, "x_row": x.stride(0), "frequencies": frequencies, "out": out, "L": L})
    want = naive.rotate_halves(x.double().reshape(L, heads, D), frequencies.double())
    # The rounded angle is off by up to half a unit in the last place of 36, 2**-19 radians.
    close(out, want.flatten(1), 4 + 2**-19 / EPS32)


# Lengths under, at and over the tiles of 16; 1, 2 and 3 queries a key head; a head width that is no power of two.
@pytest.mark.parametrize(("L", "heads", "key_heads", "D"), [(7, 2, 1, 16), (32, 2, 2, 24), (49, 6, 2, 16)])
def test_causal_attention(L: int, heads: int, key_heads: int, D: int) -> None:
    both = random(L, (heads + key_heads) * D)
    both[:, : heads * D] *= 12  # logits well beyond the cap
    v = random(L, (key_heads + 1) * D, seed=1)[:, D:]
    mask = (torch.arange(L) < L - 1 - L // 8).long()
    mask[2] = 0  # a gap, which padding never leaves
    out = empty(L, heads * D)
    q, k = both[:, : heads * D], both[:, heads * D :]
    arguments = {"q": q, "q_row": q.stride(0), "k": k, "k_row": k.stride(0), "v": v, "v_row": v.stride(0), "mask": mask, "out": out, "L": L}
    launch(plans.causal_attention("fp32", 0, heads, key_heads, D), arguments | {"softmax_scale": D**-0.5})
    wide = [t.double().reshape(L, -1, D) for t in (q, k, v)]
    want = naive.causal_attention(wide[0], wide[1], wide[2], mask, D**-0.5, plans.LOGIT_CAP)
    uncapped = naive.causal_attention(wide[0], wide[1], wide[2], mask, D**-0.5, 1e9)
    assert (uncapped - want).abs().max() > 1e-2  # the cap is felt
    # A capped logit is at most 50 and off by about 100 roundings (of 50, and of the sigmoid near 1 times 100); probabilities inherit them.
    close(out, want.flatten(1), 300)


def test_attention_of_a_token_that_sees_none() -> None:
    L, D = 5, 16
    x = random(L, D)
    mask = torch.tensor([0, 0, 1, 1, 0])
    out = empty(L, D)
    arguments = {"q": x, "q_row": D, "k": x, "k_row": D, "v": x, "v_row": D, "mask": mask, "out": out, "L": L, "softmax_scale": 1.0}
    launch(plans.causal_attention("fp32", 0, 1, 1, D), arguments)
    assert (out[:2] == 0).all()
    torch.testing.assert_close(out[2], x[2])


def test_gated_gelu() -> None:
    x = random(33, 80)
    x[0, 0] = -30
    out = empty(33, 40)
    launch(plans.gelu_gated("fp32", 40), {"x": x, "out": out, "SIZE": out.numel()})
    # The exponent of the sigmoid is off by a few roundings of its argument, which is about 40 where the result is still not nothing.
    close(out, naive.gelu_gated(x.double()), 40)


@pytest.mark.parametrize(("L", "K"), [(300, 270), (12, 12), (9, 1)])
def test_mask_of_the_selected_tokens(L: int, K: int) -> None:
    mask = (torch.randn(L, generator=torch.Generator().manual_seed(L)) > 0).long()
    out = torch.full((K,), 255, dtype=torch.uint8)
    launch(plans.token_mask(), {"mask": mask, "out": out, "L": L, "K": K})
    assert torch.equal(out.bool(), naive.token_mask(mask, K)) and out.max() <= 1

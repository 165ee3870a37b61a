"""Rotary and UCPE transforms, the RMS clamp, precision helpers, and the dispatch of fused operations.

Shapes: B batch, N tokens, H heads, D head width.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import transformer_sana_wm as diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanawm_kernels import ops
from sanawm_kernels.gdn import naive
from sanawm_kernels.numerics import rms_norm, wide
from sanawm_kernels.rotary import rms_clamp, rotate_pairs, ucpe

SEEDS = st.integers(0, 2**16)
quick = settings(max_examples=20, deadline=None)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rigid(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rigid motions (1, N, 4, 4) in float64, and their inverses."""
    P = torch.eye(4, dtype=torch.float64).repeat(1, tokens, 1, 1)
    P[..., :3, :3] = torch.linalg.qr(normal(seed, 1, tokens, 3, 3))[0]
    P[..., :3, 3] = 10 * normal(seed + 1, 1, tokens, 3)
    return P, torch.linalg.inv(P)


@quick
@given(SEEDS, st.integers(1, 5))
def test_rotation_is_complex_multiplication(seed: int, pairs: int) -> None:
    x, angle = normal(seed, 2, 3, 2, 2 * pairs), normal(seed + 1, 3, pairs)
    turned = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    found = rotate_pairs(x, angle.cos(), angle.sin())
    # The same four products in float64.
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2), atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(rotate_pairs(found, angle.cos(), -angle.sin()), x, atol=1e-14, rtol=0)


@quick
@given(SEEDS, st.integers(1, 3), st.integers(1, 14))
def test_the_output_transform_undoes_that_of_values(seed: int, heads: int, groups: int) -> None:
    N, D = 4, 8 * groups
    P, inverse = rigid(seed, N)
    angle, v = normal(seed + 2, N, D // 4), normal(seed + 3, 2, N, heads, D)
    moved = ucpe(v, inverse, angle.cos(), angle.sin())
    back = ucpe(moved, P, angle.cos(), -angle.sin())
    # Float64 through translations of about thirty units.
    torch.testing.assert_close(back, v, atol=1e-12, rtol=0)
    assert (moved - v).abs().max() > 1e-3


@quick
@given(SEEDS)
def test_products_of_queries_and_keys_depend_on_relative_geometry_alone(seed: int) -> None:
    """(P1^T q) . (P2^-1 k) = q . P1 P2^-1 k: unchanged when the world moves."""
    N, D = 3, 16
    P, inverse = rigid(seed, N)
    world, world_inverse = rigid(seed + 7, 1)
    angle, q, k = normal(seed + 2, N, D // 4), normal(seed + 3, 1, N, 1, D), normal(seed + 4, 1, N, 1, D)
    tables = angle.cos(), angle.sin()
    scores = [
        torch.einsum("bnhd,bmhd->bnm", ucpe(q, A.mT, *tables), ucpe(k, B, *tables))
        for A, B in ((P, inverse), (P @ world_inverse, world @ inverse))
    ]
    # Float64 on products of translations of about thirty units.
    torch.testing.assert_close(scores[0], scores[1], atol=1e-9, rtol=0)


@quick
@given(SEEDS, st.sampled_from([8, 16, 112]), st.booleans())
def test_ucpe_is_diffusers_transform(seed: int, width: int, output: bool) -> None:
    N, H = 5, 2
    P, _ = rigid(seed, N)
    P[..., :3, 3] /= 10
    angle, x = normal(seed + 2, N, width // 4), normal(seed + 3, 1, N, H, width, dtype=torch.float32)
    table = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    theirs = diffusers._apply_ucpe_transform(x.transpose(1, 2), P.float(), table, inverse_rope=output).transpose(1, 2)
    ours = ucpe(x, P.float(), angle.cos(), -angle.sin() if output else angle.sin())
    # Four products of numbers below ten in float32.
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


@quick
@given(SEEDS, st.floats(0.01, 20))
def test_clamp_is_diffusers_downscaling(seed: int, growth: float) -> None:
    before = normal(seed, 1, 3, 2, 8)
    after = growth * normal(seed + 1, 1, 3, 2, 8)
    found = rms_clamp(after, before)
    theirs = diffusers._downscale_to_reference_rms(before.permute(0, 2, 3, 1), after.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, theirs, atol=1e-14, rtol=1e-14)
    # The clamp's own 1e-6 lets a vector exceed its reference by that much under the root.
    assert (found.square().mean(-1) <= before.square().mean(-1) + 2e-6).all()
    grown = after.square().mean(-1) > before.square().mean(-1)
    assert torch.equal(found[~grown], after[~grown])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_at_least_float32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    x, angle = normal(0, 1, 2, 1, 8).to(dtype), torch.zeros(2, 2)
    P = torch.eye(4).expand(1, 2, 4, 4)
    assert wide(x).dtype == rms_norm(x, torch.ones(8, dtype=dtype), 1e-5).dtype == expected
    assert ucpe(x, P, angle.cos(), angle.sin()).dtype == rotate_pairs(x[..., :4], angle.cos(), angle.sin()).dtype == expected
    # The identity transform of any precision is that vector, widened.
    torch.testing.assert_close(ucpe(x, P, angle.cos(), angle.sin()), wide(x), atol=0, rtol=0)


def test_norm_applies_its_weight_in_full_precision() -> None:
    x, weight = normal(1, 4, 16).bfloat16(), (1 + 0.1 * normal(2, 16)).bfloat16()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = rms_norm(x, weight, 1e-5)
    # A few float32 roundings; rounding the normalised value to bfloat16 first would give 4e-3.
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_dispatch_is_explicit_and_scoped() -> None:
    P = torch.eye(4).expand(1, 1, 4, 4)
    zero = torch.zeros(1, 1)
    arguments = torch.ones(1, 1, 1, 8), P, torch.ones(1, 2), torch.zeros(1, 2)
    other = SimpleNamespace(main_gdn=lambda *a, **k: "main", camera_gdn=lambda *a, **k: "camera", ucpe=lambda *a: zero)
    with ops.implementation(other):
        assert ops.main_gdn() == "main" and ops.camera_gdn() == "camera" and ops.ucpe(*arguments) is zero
        with ops.implementation(ops.NAIVE):
            assert torch.equal(ops.ucpe(*arguments), torch.ones(1, 1, 1, 8))
        assert ops.ucpe(*arguments) is zero
    assert torch.equal(ops.ucpe(*arguments), torch.ones(1, 1, 1, 8))
    assert ops.NAIVE.main_gdn is naive.main_gdn and ops.NAIVE.camera_gdn is naive.camera_gdn


def test_a_failure_restores_the_dispatch() -> None:
    with pytest.raises(AttributeError), ops.implementation(SimpleNamespace()):
        ops.main_gdn()
    P = torch.eye(4).expand(1, 1, 4, 4)
    assert torch.equal(ops.ucpe(torch.ones(1, 1, 1, 8), P, torch.ones(1, 2), torch.zeros(1, 2)), torch.ones(1, 1, 1, 8))

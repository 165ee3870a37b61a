"""The plain gated delta network against a second formulation, against diffusers, and against what the delta rule must satisfy.

Shapes: T frames, S tokens a frame, H heads, D head width, C = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_sana_wm as diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sanawm_kernels.gdn.naive import Gates, camera_gdn, main_gdn, short_conv

SEEDS = st.integers(0, 2**16)
CHUNKS = st.lists(st.integers(1, 3), min_size=1, max_size=4)
# Float64 sums of at most a hundred terms of size one, over at most a dozen frames; a float32 step gives 1e-7.
EXACT = 1e-12
KEY_SCALE = 0.1
# Of the model, stated again.
NORM_EPS, DENOMINATOR_EPS = 1e-5, 1e-8

quick = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Case:
    """Raw inputs of both branches in float64, `frame` tokens a frame."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    conv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    angles: Tensor
    cam_angles: Tensor
    rays: Tensor
    frame: int

    @property
    def rays_inverse(self) -> Tensor:
        return torch.linalg.inv(self.rays)

    def main(self, chunks: tuple[int, ...], state: Any = None, span: slice = slice(None), **options: Any) -> tuple[Tensor, ...]:
        c = self.take(span)
        options = {"chunks": chunks, "key_scale": KEY_SCALE, "state": state} | options
        return main_gdn(c.q, c.k, c.v, c.gates, c.conv, c.q_norm, c.k_norm, c.angles.cos(), c.angles.sin(), **options)

    def camera(self, chunks: tuple[int, ...], state: Any = None, span: slice = slice(None), **options: Any) -> tuple[Tensor, ...]:
        c = self.take(span)
        options = {"chunks": chunks, "key_scale": KEY_SCALE, "state": state} | options
        tables = c.rays, c.rays_inverse, c.cam_angles.cos(), c.cam_angles.sin()
        return camera_gdn(c.q, c.k, c.v, c.gates, c.conv, c.q_norm, c.k_norm, *tables, **options)

    def take(self, frames: slice) -> Case:
        """The case on some frames."""
        return self.tokens(torch.arange(self.q.shape[1]).reshape(-1, self.frame)[frames].flatten())

    def tokens(self, order: Tensor) -> Case:
        """The case with tokens chosen or reordered."""
        per_token = {name: getattr(self, name)[:, order] for name in ("q", "k", "v", "rays")}
        tables = {name: getattr(self, name)[order] for name in ("angles", "cam_angles")}
        gates = {name: getattr(self.gates, name)[:, order] for name in ("beta_logits", "decay_logits")}
        return replace(self, gates=replace(self.gates, **gates), **per_token, **tables)


def make(seed: int, T: int, S: int = 3, H: int = 2, D: int = 8) -> Case:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    N, C = T * S, H * D
    rays = torch.eye(4, dtype=torch.float64).repeat(1, N, 1, 1)
    rays[..., :3, :3] = torch.linalg.qr(normal(1, N, 3, 3))[0]
    rays[..., :3, 3] = 2 * normal(1, N, 3)
    gates = Gates(normal(1, N, H), normal(1, N, H), -torch.rand(H, generator=random, dtype=torch.float64), normal(H) - 1)
    norms = 1 + 0.1 * normal(2, C)
    q, k, v = normal(3, 1, N, C)
    return Case(q, k, v, gates, normal(C, 4), norms[0], norms[1], normal(N, D // 2), normal(N, D // 4), rays, S)


# A second formulation: numpy, one head at a time, the affine form S_t = S_{t-1} W_t + U_t for the forward scan, and for the backward scan the
# same form on the reversed frames, shifted by one.


def affine_scan(k: NDArray, v: NDArray, beta: NDArray, decay: NDArray, state: NDArray) -> list[NDArray]:
    """States after each frame; k (T, S, Dk), v (T, S, Dv), beta (T, S), decay (T,), state (Dv, Dk)."""
    states = []
    for K, V, b, g in zip(k, v, beta, decay, strict=True):
        W = g * (np.eye(K.shape[1]) - K.T @ (b[:, None] * K))
        state = state @ W + V.T @ (b[:, None] * K)
        states.append(state)
    return states


def both_scans(q: NDArray, k: NDArray, v: NDArray, beta: NDArray, decay: NDArray, chunks: tuple[int, ...], state: NDArray) -> tuple[NDArray, NDArray]:
    """(T, S, Dv) outputs and the last forward state."""
    forward = affine_scan(k, v, beta, decay, state)
    out = np.stack([q_t @ s.T for q_t, s in zip(q, forward, strict=True)])
    start = 0
    for n in chunks:
        part = slice(start, start + n)
        reverse = affine_scan(k[part][::-1], v[part][::-1], beta[part][::-1], decay[part][::-1], np.zeros_like(state))
        exclusive = [np.zeros_like(state), *reverse[:-1]][::-1]
        out[part] += np.stack([q_t @ s.T for q_t, s in zip(q[part], exclusive, strict=True)])
        start += n
    return out, forward[-1]


def filtered_keys(case: Case, chunks: tuple[int, ...], tail: NDArray | None) -> NDArray:
    """(T, S, C) keys after the seven taps w0 w1 w2 w3 w2 w1 w0, tap by tap."""
    T, C = sum(chunks), case.k.shape[-1]
    raw, w = case.k.numpy().reshape(T, -1, C), case.conv.numpy()
    ends = np.repeat(np.cumsum(chunks), chunks)
    out = np.zeros_like(raw)
    for t in range(T):
        for j in range(-3, 4):
            if t + j >= ends[t]:
                continue
            source = raw[t + j] if t + j >= 0 else (tail[3 + t + j] if tail is not None else 0)
            out[t] += w[:, 3 - abs(j)] * source
    return out


def normed(x: NDArray, weight: Tensor) -> NDArray:
    return np.maximum(x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * weight.numpy(), 0)


def gates_of(case: Case, T: int) -> tuple[NDArray, NDArray]:
    """beta (T, S, H) and decay (T, H) by their formulas."""
    g = case.gates
    beta = 1 / (1 + np.exp(-g.beta_logits.numpy()[0]))
    softplus = np.log1p(np.exp(g.decay_logits.numpy()[0].reshape(T, -1, len(g.dt_bias)).mean(1) + g.dt_bias.numpy()))
    return beta.reshape(T, -1, beta.shape[-1]), np.exp(-np.exp(g.A_log.numpy()) * softplus)


def rotated(x: NDArray, angles: Tensor) -> NDArray:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles.numpy())
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def second_main(case: Case, chunks: tuple[int, ...], state: Any) -> tuple[NDArray, NDArray, NDArray]:
    T, H = sum(chunks), case.gates.A_log.shape[0]
    N, C = case.q.shape[1:]
    S, D = N // T, C // H
    tail = None if state is None else state[2].numpy()[0]
    q = normed(case.q.numpy()[0], case.q_norm).reshape(N, H, D)
    k = (normed(filtered_keys(case, chunks, tail), case.k_norm) * KEY_SCALE).reshape(N, H, D)
    v = case.v.numpy()[0].reshape(T, S, H, D)
    beta, decay = gates_of(case, T)
    outs, states, normalisers = [], [], []
    for h in range(H):
        s0 = np.zeros((D, D)) if state is None else state[0].numpy()[0, h]
        z0 = np.zeros((1, D)) if state is None else state[1].numpy()[0, h][None]
        turned_q, turned_k = (rotated(x[:, h], case.angles).reshape(T, S, D) for x in (q, k))
        plain_q, plain_k = (x[:, h].reshape(T, S, D) for x in (q, k))
        numerator, s = both_scans(turned_q, turned_k, v[:, :, h], beta[..., h], decay[:, h], chunks, s0)
        denominator, z = both_scans(plain_q, plain_k, np.ones((T, S, 1)), beta[..., h], decay[:, h], chunks, z0)
        outs.append(numerator / (denominator + DENOMINATOR_EPS))
        states.append(s)
        normalisers.append(z[0])
    return np.stack(outs, 2).reshape(N, C), np.stack(states), np.stack(normalisers)


def ucpe_of(x: NDArray, matrix: Tensor, angles: Tensor) -> NDArray:
    half = x.shape[-1] // 2
    groups = np.einsum("nij,ngj->ngi", matrix.numpy(), x[:, :half].reshape(len(x), -1, 4)).reshape(len(x), half)
    return np.concatenate([groups, rotated(x[:, half:], angles)], -1)


def second_camera(case: Case, chunks: tuple[int, ...], state: Any) -> tuple[NDArray, NDArray]:
    T, H = sum(chunks), case.gates.A_log.shape[0]
    N, C = case.q.shape[1:]
    S, D = N // T, C // H
    tail = None if state is None else state[1].numpy()[0]
    q = normed(case.q.numpy()[0], case.q_norm).reshape(N, H, D)
    k = (normed(filtered_keys(case, chunks, tail), case.k_norm) * KEY_SCALE).reshape(N, H, D)
    v = case.v.numpy()[0].reshape(N, H, D)
    beta, decay = gates_of(case, T)
    rays, inverse, angles = case.rays[0], case.rays_inverse[0], case.cam_angles
    outs, states = [], []
    for h in range(H):
        qt, kt, vt = (
            ucpe_of(x[:, h], matrix, angles).reshape(T, S, D) for x, matrix in ((q, rays.mT), (k, inverse), (v, inverse))
        )
        ratio = np.maximum((kt**2).sum(-1), 1e-12) / np.maximum((k[:, h] ** 2).sum(-1), 1e-12).reshape(T, S)
        strength = beta[..., h] / np.maximum(1, ratio.mean(1, keepdims=True))
        s0 = np.zeros((D, D)) if state is None else state[0].numpy()[0, h]
        numerator, s = both_scans(qt, kt, vt, strength, decay[:, h], chunks, s0)
        outs.append(ucpe_of(numerator.reshape(N, D), rays, -angles))
        states.append(s)
    return np.stack(outs, 1).reshape(N, C), np.stack(states)


def random_state(seed: int, S: int = 3, H: int = 2, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (1, H, D, D), (1, H, D), (1, 3, S, H * D)
    s, z, tail = (torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return s, z + 1, tail


def agree(found: Tensor, expected: NDArray, tolerance: float = EXACT) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.numpy().squeeze(0), expected, atol=tolerance * scale, rtol=0)


@quick
@given(SEEDS, CHUNKS, st.booleans())
def test_main_is_the_affine_form(seed: int, chunks: list[int], carried: bool) -> None:
    grid = tuple(chunks)
    case, state = make(seed, sum(grid)), random_state(seed) if carried else None
    out, s, z, tail = case.main(grid, state)
    expected, s_expected, z_expected = second_main(case, grid, state)
    # A denominator near zero amplifies the float64 rounding of its sum.
    agree(out, expected, 1e-9)
    agree(s, s_expected)
    agree(z, z_expected)
    raw = case.k.reshape(sum(grid), 3, -1)
    before = torch.zeros(3, 3, 16, dtype=torch.float64) if state is None else state[2][0]
    assert torch.equal(tail[0], torch.cat((before, raw))[-3:])


@quick
@given(SEEDS, CHUNKS, st.booleans())
def test_camera_is_the_affine_form(seed: int, chunks: list[int], carried: bool) -> None:
    grid = tuple(chunks)
    case = make(seed, sum(grid))
    s0, _, tail0 = random_state(seed)
    state = (s0, tail0) if carried else None
    out, s, _ = case.camera(grid, state)
    expected, s_expected = second_camera(case, grid, state)
    agree(out, expected)
    agree(s, s_expected)


@quick
@given(SEEDS, CHUNKS, st.data())
def test_split_between_chunks(seed: int, chunks: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(chunks)), "chunks in the first call")
    first, rest = tuple(chunks[:cut]), tuple(chunks[cut:])
    case, frames = make(seed, sum(chunks)), sum(first)
    if not first or not rest:
        return
    for carry in (True, False):
        for run, fields in ((case.main, 4), (lambda *a: case.camera(*a, carry=carry), 3)):  # noqa: B023
            whole = run(tuple(chunks))
            head = run(first, None, slice(0, frames))
            tail = run(rest, head[1:], slice(frames, None))
            torch.testing.assert_close(torch.cat((head[0], tail[0]), 1), whole[0], atol=1e-9, rtol=0)
            for i in range(1, fields):
                torch.testing.assert_close(tail[i], whole[i], atol=EXACT, rtol=0)


@quick
@given(SEEDS, CHUNKS, st.booleans())
def test_order_inside_a_frame_does_not_matter(seed: int, chunks: list[int], clamp: bool) -> None:
    T, S = sum(chunks), 4
    case = make(seed, T, S)
    within = [torch.randperm(S, generator=torch.Generator().manual_seed(seed + t)) for t in range(T)]
    # The short convolution is a function of a position's past, so one order holds for the clip.
    order = torch.cat([within[0] + t * S for t in range(T)])
    shuffled = case.tokens(order)
    grid = tuple(chunks)
    for run, run_shuffled in ((case.main, shuffled.main), (lambda g: case.camera(g, clamp=clamp), lambda g: shuffled.camera(g, clamp=clamp))):
        out, found = run(grid), run_shuffled(grid)
        torch.testing.assert_close(found[0], out[0][:, order], atol=1e-9, rtol=0)
        torch.testing.assert_close(found[1], out[1], atol=EXACT, rtol=0)


@pytest.mark.parametrize("chunks", [(4,), (2, 2), (1, 1, 1, 1)])
def test_nothing_written_and_nothing_forgotten(chunks: tuple[int, ...]) -> None:
    case = make(3, 4)
    shut = replace(case.gates, beta_logits=torch.full_like(case.gates.beta_logits, -1000), A_log=torch.full((2,), -1000.0, dtype=torch.float64))
    case = replace(case, gates=shut)
    for out in (case.main(chunks), case.camera(chunks)):
        assert not out[0].any() and not out[1].any()
    # A state comes through as it went in.
    s, z, tail = random_state(1)
    _, s_out, z_out, _ = case.main(chunks, (s, z, tail))
    assert torch.equal(s_out, s) and torch.equal(z_out, z)
    assert torch.equal(case.camera(chunks, (s, tail))[1], s)


@pytest.mark.parametrize("S", [1, 4, 8])
def test_orthonormal_keys_are_recalled_after_one_frame(S: int) -> None:
    H, D = 1, 8
    case = make(5, 1, S, H, D)
    # Large raw keys along one channel each, for which the norm is division by their length; weights undo the norm's and the key scale.
    keys = torch.zeros(1, S, D, dtype=torch.float64)
    keys[0, torch.arange(S), torch.arange(S)] = 1e8
    identity = torch.zeros(D, 4, dtype=torch.float64)
    identity[:, 3] = 1
    wide_open = replace(case.gates, beta_logits=torch.full_like(case.gates.beta_logits, 1000))
    norm = torch.full((D,), 1 / (D**0.5 * KEY_SCALE), dtype=torch.float64)
    case = replace(case, k=keys, conv=identity, gates=wide_open, k_norm=norm, angles=torch.zeros_like(case.angles))
    _, s, z, _ = case.main((1,), random_state(2, S, H, D))
    recalled = s[0, 0] @ torch.eye(D, dtype=torch.float64)[:, :S]
    torch.testing.assert_close(recalled.T, case.v[0], atol=EXACT, rtol=0)
    torch.testing.assert_close(z[0, 0, :S], torch.ones(S, dtype=torch.float64), atol=EXACT, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_without_positive_channels_reads_zero(dtype: torch.dtype) -> None:
    case = make(7, 3)
    case = replace(case, q=-case.q.abs(), q_norm=case.q_norm.abs())
    gates = Gates(*(getattr(case.gates, n).to(dtype) for n in ("beta_logits", "decay_logits", "A_log", "dt_bias")))
    narrow = replace(case, gates=gates, **{n: getattr(case, n).to(dtype) for n in ("q", "k", "v", "conv", "q_norm", "k_norm")})
    out = narrow.main((3,))[0]
    assert out.dtype == dtype and not out.any()


@quick
@given(SEEDS, CHUNKS, st.booleans(), st.booleans())
def test_short_convolution(seed: int, chunks: list[int], with_tail: bool, carry: bool) -> None:
    T, S, C = sum(chunks), 2, 4
    random = np.random.default_rng(seed)
    raw, taps, tail = random.normal(size=(1, T, S, C)), random.normal(size=(C, 4)), random.normal(size=(1, 3, S, C)) if with_tail else None
    given_tail = None if tail is None else torch.from_numpy(tail)
    out, new_tail = short_conv(torch.from_numpy(raw), torch.from_numpy(taps), chunks, given_tail, carry)
    history = np.concatenate([np.zeros((1, 3, S, C)) if tail is None else tail, raw], 1)
    ends = np.cumsum(chunks)
    expected = np.zeros_like(raw)
    for t in range(T):
        chunk = int(np.searchsorted(ends, t, "right"))
        begin = -3 if carry else ends[chunk] - chunks[chunk]
        for s in range(max(t - 3, begin), min(t + 4, ends[chunk])):
            expected[:, t] += taps[:, 3 - abs(s - t)] * history[:, s + 3]
    # Seven products in float64.
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-14, rtol=0)
    np.testing.assert_array_equal(new_tail.numpy(), history[:, -3:])


def diffusers_operands(case: Case, T: int, H: int, D: int) -> dict[str, Any]:
    """Normed operands as diffusers' attention modules take them, float32."""
    beta, decay = gates_of(case, T)
    q, k = normed(case.q.numpy()[0], case.q_norm), normed(filtered_keys(case, (T,), None), case.k_norm)
    arrays = {"query": q.reshape(1, -1, H, D), "key": k.reshape(1, -1, H, D), "value": case.v.numpy().reshape(1, -1, H, D)}
    arrays |= {"beta": beta.transpose(2, 0, 1)[None], "decay": decay.T[None]}
    return {name: torch.from_numpy(np.ascontiguousarray(x)).float() for name, x in arrays.items()} | {"num_frames": T}


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_diffusers_main(frames: int) -> None:
    S, H, D = 3, 2, 8
    case = make(11, frames, S, H, D)
    table = torch.polar(torch.ones_like(case.angles), case.angles).to(torch.complex64)
    attention = diffusers.SanaWMBidirectionalGDNAttention(eps=DENOMINATOR_EPS)
    theirs = attention(**diffusers_operands(case, frames, H, D), recall_gate=torch.zeros(1), rotary_emb=table[None, None])
    ours = case.main((frames,), key_scale=(D * S) ** -0.5)[0]
    # They compute in float32; the quotient of two sums of size one.
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_diffusers_camera(frames: int) -> None:
    S, H, D = 3, 2, 8
    case = make(13, frames, S, H, D)
    table = torch.polar(torch.ones_like(case.cam_angles), case.cam_angles).to(torch.complex64)[None, None]
    rays, inverse = case.rays.float(), case.rays_inverse.float()
    attention = diffusers.SanaWMBidirectionalGDNCamAttention()
    theirs = attention(**diffusers_operands(case, frames, H, D), ray_transforms=(rays, rays.mT, inverse, table))
    ours = case.camera((frames,), clamp=True, key_scale=(D * S) ** -0.5)[0]
    unclamped = case.camera((frames,), key_scale=(D * S) ** -0.5)[0]
    # They compute in float32, on values of about ten.
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5, rtol=2e-5)
    assert (ours - unclamped).abs().max() > 1e-3

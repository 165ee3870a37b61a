"""Host side of the kernels around the attention and the FFN; signatures and results are those of `naive`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.quant.request import Output, Quantize, empty_quantized
from sanawm_kernels.tokenwise import block_plans as plans
from sanawm_kernels.tokenwise.launch import launch, matching_rows, rows, same, target, type_name, vector
from sanawm_kernels.tokenwise.row_ops import quantized_arguments, quantized_plan


def depthwise_glu(x_BNG: Tensor, taps_9G: Tensor, bias_G: Tensor, grid: tuple[int, int], *, quantize: Quantize | None = None) -> Output:
    """See `naive.depthwise_glu`. Raises ValueError for "fp8_rows": a program sees only some channels of a token."""
    what = "depthwise_glu"
    h, w = grid
    flat = rows(x_BNG, f"{what} x")
    width = flat.shape[1]
    if flat.shape[0] % (h * w) or width % 2:
        raise ValueError(
            f"{what}: expected whole frames of {h}x{w} tokens with an even number of channels, found shape {tuple(x_BNG.shape)}"
        )
    if tuple(taps_9G.shape) != (9, width) or not taps_9G.is_contiguous():
        raise ValueError(f"{what}: expected contiguous taps (9, {width}), found {tuple(taps_9G.shape)} with strides {taps_9G.stride()}")
    vector(bias_G, width, f"{what} bias")
    same(f"{what} weights", taps_9G, bias_G)
    if quantize is not None and quantize.kind == "fp8_rows":
        raise ValueError(f"{what}: expected a calibrated scale, found fp8_rows; no program sees all channels of a token")
    shape = (*x_BNG.shape[:-1], width // 2)
    parameters = quantized_plan(quantize, x_BNG.device)
    out = torch.empty(shape, dtype=x_BNG.dtype, device=x_BNG.device) if parameters["keep"] else None
    quantized = empty_quantized(shape, quantize, x_BNG.device)
    row, aligned = flat.stride(0), flat.data_ptr() % 16 == 0
    kinds = type_name(flat, what), type_name(taps_9G, what)
    variant = plans.depthwise_glu_for(target(x_BNG.device), *kinds, h, w, width // 2, row, aligned=aligned, **parameters)
    arguments: dict[str, Any] = {"x": flat, "x_row": row, "taps": taps_9G, "bias": bias_G} | (
        {} if out is None else {"out": out}
    )
    launch(variant, arguments | quantized_arguments(quantized, quantize, x_BNG.device), FRAMES=flat.shape[0] // (h * w))
    return Output(out, quantized)


def _tables(what: str, cos: Tensor, sin: Tensor, tokens: int, pairs: int) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != (tokens, pairs) or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"{what}: expected a contiguous float32 {name} table ({tokens}, {pairs}), found {tuple(table.shape)} {table.dtype}"
            )


def _head_width(what: str, channels: int, heads: int) -> int:
    if channels % heads or (channels // heads) % 8:
        raise ValueError(f"{what}: expected heads of a multiple of 8 channels, found {channels} channels in {heads} heads")
    return channels // heads


def rope_heads(
    q_BNC: Tensor, k_BNC: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `naive.rope_heads`."""
    q, k = _rope(q_BNC, k_BNC, q_norm, k_norm, cos, sin, heads, eps, None, None)
    return q, k


def rope_heads_fp8(
    q_BNC: Tensor,
    k_BNC: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """`rope_heads` with e4m3 results under the given float32 scales ()."""
    return _rope(q_BNC, k_BNC, q_norm, k_norm, cos, sin, heads, eps, q_scale, k_scale)


def _rope(
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    what = "rope_heads"
    B, N, C = q.shape
    D = _head_width(what, C, heads)
    _tables(what, cos, sin, N, D // 2)
    same(what, q, k)
    same(f"{what} norms", q_norm, k_norm)
    flat = {"q": rows(q, f"{what} q"), "k": matching_rows(k, (B, N, C), f"{what} k")}
    fp8 = q_scale is not None
    dtype = torch.float8_e4m3fn if fp8 else q.dtype
    out = {f"{name}_out": torch.empty(B, N, heads, D, dtype=dtype, device=q.device) for name in flat}
    weights = {"q_norm": vector(q_norm, C, f"{what} q_norm"), "k_norm": vector(k_norm, C, f"{what} k_norm")}
    arguments: dict[str, Any] = {
        **flat,
        **{f"{name}_row": x.stride(0) for name, x in flat.items()},
        **weights,
        **out,
        "cos": cos,
        "sin": sin,
        "ROWS": B * N,
    }
    if fp8:
        arguments |= {"q_scale": q_scale, "k_scale": k_scale}
    launch(plans.rope_heads(type_name(q, what), type_name(q_norm, what), heads, D, N, eps, fp8), arguments)
    return out["q_out"], out["k_out"]


def _rays(what: str, rays: Tensor, batch: int, tokens: int) -> Tensor:
    if tuple(rays.shape) not in ((batch, tokens, 4, 4), (1, tokens, 4, 4)) or rays.dtype != torch.float32 or not rays.is_contiguous():
        raise ValueError(
            f"{what}: expected contiguous float32 ray matrices ({batch} or 1, {tokens}, 4, 4), found {tuple(rays.shape)} {rays.dtype}"
        )
    return rays


def ucpe_heads(
    q_BNC: Tensor,
    k_BNC: Tensor,
    v_BNC: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rays: Tensor,
    rays_inverse: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    *,
    clamp: bool = False,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `naive.ucpe_heads`; with float32 scales () queries and keys are e4m3 (values stay as they are, see `fp8_values_transposed`)."""
    what = "ucpe_heads"
    B, N, C = q_BNC.shape
    D = _head_width(what, C, heads)
    _tables(what, cos, sin, N, D // 4)
    same(what, q_BNC, k_BNC, v_BNC)
    same(f"{what} norms", q_norm, k_norm)
    if (q_scale is None) != (k_scale is None):
        raise ValueError(f"{what}: expected both or neither of the scales of queries and keys")
    if rays_inverse.shape != rays.shape:
        raise ValueError(
            f"{what}: expected ray matrices and inverses of one shape, found {tuple(rays.shape)} and {tuple(rays_inverse.shape)}"
        )
    matrices = {"rays": _rays(what, rays, B, N), "rays_inverse": _rays(what, rays_inverse, B, N)}
    flat = {
        "q": rows(q_BNC, f"{what} q"),
        "k": matching_rows(k_BNC, (B, N, C), f"{what} k"),
        "v": matching_rows(v_BNC, (B, N, C), f"{what} v"),
    }
    fp8 = q_scale is not None
    dtype = torch.float8_e4m3fn if fp8 else q_BNC.dtype
    out = {f"{name}_out": torch.empty(B, N, heads, D, dtype=q_BNC.dtype if name == "v" else dtype, device=q_BNC.device) for name in flat}
    weights = {"q_norm": vector(q_norm, C, f"{what} q_norm"), "k_norm": vector(k_norm, C, f"{what} k_norm")}
    arguments: dict[str, Any] = {**flat, **{f"{name}_row": x.stride(0) for name, x in flat.items()}, **weights, **matrices, **out}
    arguments |= {"cos": cos, "sin": sin, "ROWS": B * N} | ({"q_scale": q_scale, "k_scale": k_scale} if fp8 else {})
    launch(plans.ucpe_heads(type_name(q_BNC, what), type_name(q_norm, what), heads, D, N, rays.shape[0] * N, eps, clamp, fp8), arguments)
    return out["q_out"], out["k_out"], out["v_out"]


def inverse_ucpe(x_BNHD: Tensor, rays: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `naive.inverse_ucpe`."""
    what = "inverse_ucpe"
    B, N, H, D = x_BNHD.shape
    _head_width(what, H * D, H)
    _tables(what, cos, sin, N, D // 4)
    if x_BNHD.stride(2) != D:
        raise ValueError(f"{what}: expected adjacent heads, found shape {tuple(x_BNHD.shape)} with strides {x_BNHD.stride()}")
    flat = rows(x_BNHD.flatten(2), f"{what} x")
    out = torch.empty(B, N, H * D, dtype=x_BNHD.dtype, device=x_BNHD.device)
    variant = plans.inverse_ucpe(type_name(flat, what), H, D, N, _rays(what, rays, B, N).shape[0] * N)
    launch(variant, {"x": flat, "x_row": flat.stride(0), "rays": rays, "cos": cos, "sin": sin, "out": out, "ROWS": B * N})
    return out


def fp8_values_transposed(v_BNHD: Tensor, scale: Tensor) -> Tensor:
    """See `naive.fp8_values_transposed`; the rows are padded with zeros to a multiple of 16 keys in memory, which the view leaves out."""
    what = "fp8_values_transposed"
    B, N, H, D = v_BNHD.shape
    if v_BNHD.stride(3) != 1 or v_BNHD.stride(2) != D:
        raise ValueError(f"{what}: expected adjacent heads and channels, found shape {tuple(v_BNHD.shape)} with strides {v_BNHD.stride()}")
    padded = -(-N // 16) * 16
    out = torch.empty(B, H, D, padded, dtype=torch.float8_e4m3fn, device=v_BNHD.device)
    variant = plans.transpose_values(type_name(v_BNHD, what), H, D)
    arguments = {
        "v": v_BNHD,
        "v_row": v_BNHD.stride(1),
        "v_batch": v_BNHD.stride(0),
        "scale": scale,
        "out": out,
        "TOKENS": N,
        "out_row": padded,
    }
    launch(variant, arguments, BATCH=B)
    return out[..., :N]

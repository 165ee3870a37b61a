"""Triton implementations of the attentions, with the signatures of `naive`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.attention import plans, table
from sanawm_kernels.attention.naive import Fp8Scales, InverseUCPE, Segment
from sanawm_kernels.quant.request import Output, Quantize, empty_quantized
from sanawm_kernels.tokenwise.launch import launch, multiprocessors, native_fp4, target, type_name, vector
from sanawm_kernels.tokenwise.row_ops import quantized_arguments


def _heads(x: Tensor, shape: tuple[int | None, ...], what: str) -> Tensor:
    """x (B, n, H, D) with adjacent heads and channels, checked; None matches any size."""
    if x.dim() != 4 or any(want is not None and have != want for have, want in zip(x.shape, shape)):
        raise ValueError(f"{what}: expected shape {tuple('any' if s is None else s for s in shape)}, found {tuple(x.shape)}")
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        raise ValueError(f"{what}: expected adjacent heads and channels, found shape {tuple(x.shape)} with strides {x.stride()}")
    return x


def _transposed(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if tuple(x.shape) != shape:
        raise ValueError(f"{what}: expected transposed FP8 values of shape {shape}, found {tuple(x.shape)}")
    if x.stride(3) != 1 or x.stride(1) != x.shape[2] * x.stride(2) or x.stride(2) % 16:
        raise ValueError(
            f"{what}: expected adjacent keys in rows a multiple of 16 apart, found strides {x.stride()}; use fp8_values_transposed"
        )
    return x


def window_attention(
    q_BNHD: Tensor,
    segments: Sequence[Segment],
    scale: float,
    *,
    fp8: Fp8Scales | None = None,
    ucpe: InverseUCPE | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantize | None = None,
    tile: table.Tile | None = None,
) -> Output:
    """See `naive.window_attention`; `tile` overrides the table's choice (for tuning)."""
    what = "window_attention"
    B, N, H, D = _heads(q_BNHD, (None,) * 4, f"{what} q").shape
    kind = type_name(q_BNHD, f"{what} q", ("fp8e4nv",) if fp8 else ("bf16", "fp16", "fp32"))
    if not 1 <= len(segments) <= 3:
        raise ValueError(f"{what}: expected one to three segments, found {len(segments)}")
    if D % 8 or D > 128 or (fp8 is not None and D % 16):
        raise ValueError(f"{what}: expected a head width up to 128 and a multiple of {16 if fp8 else 8}, found {D}")
    if fp8 is not None and dtype is None:
        raise ValueError(f"{what}: expected dtype, the output's, with FP8 operands")
    dtype = dtype or q_BNHD.dtype
    arguments: dict[str, Any] = {"q": q_BNHD, "q_row": q_BNHD.stride(1), "q_batch": q_BNHD.stride(0), "N": N, "softmax_scale": float(scale)}
    for i, segment in enumerate(segments):
        name = f"{what} segment {i}"
        k = _heads(segment.keys, (B, None, H, D), f"{name} keys")
        n = k.shape[1]
        v = _transposed(segment.values, (B, H, D, n), name) if fp8 else _heads(segment.values, (B, n, H, D), f"{name} values")
        if n == 0 or k.dtype != q_BNHD.dtype or v.dtype != q_BNHD.dtype:
            raise ValueError(f"{name}: expected at least one key and q's dtype {q_BNHD.dtype}, found {n} keys, {k.dtype} and {v.dtype}")
        arguments |= {f"k{i}": k, f"k{i}_row": k.stride(1), f"k{i}_batch": k.stride(0), f"n{i}": n}
        arguments |= {f"v{i}": v, f"v{i}_row": v.stride(2 if fp8 else 1), f"v{i}_batch": v.stride(0)}
    if fp8 is not None:
        arguments |= {"q_scale": fp8.query, "k_scale": fp8.key, "v_scale": fp8.value}
    rays_batched = 0
    if ucpe is not None:
        rays_batched = _check_ucpe(ucpe, B, N, D, what)
        arguments |= {"rays": ucpe.rays, "cos": ucpe.cos, "sin": ucpe.sin}
    request = _request(quantize, D, what)
    out = torch.empty(B, N, H * D, dtype=dtype, device=q_BNHD.device) if request["keep"] else None
    quantized = empty_quantized((B, N, H * D), quantize, q_BNHD.device)
    chosen = tile or table.tile("window", target(q_BNHD.device), kind)
    variant = plans.window_attention(
        kind, H, D, len(segments), chosen, out=type_name(torch.empty(0, dtype=dtype), what), ucpe=ucpe is not None, rays_batched=rays_batched,
        native=native_fp4(q_BNHD.device), **request,
    )  # fmt: skip
    arguments |= ({} if out is None else {"out": out}) | quantized_arguments(quantized, quantize, q_BNHD.device)
    launch(variant, arguments, BATCH=B)
    return Output(out, quantized)


def window_pair(
    main_q_NHD: Tensor,
    main: Sequence[Segment],
    main_scale: float,
    camera_q_NHD: Tensor,
    camera: Sequence[Segment],
    camera_scale: float,
    ucpe: InverseUCPE,
    *,
    quantize: Quantize | None = None,
    tile: table.PairTile | None = None,
) -> tuple[Tensor, Output]:
    """`naive.window_attention` of one batch's main branch (N, C), and of its camera branch, with `ucpe` and `quantize`, in bfloat16, on Hopper.

    Keys and values of a segment are (n, H, D); segments of both branches are equally long. `tile` overrides the table's choice (for tuning).
    """
    what = "window_pair"
    N, H, D = main_q_NHD.shape
    device = main_q_NHD.device
    lengths = [segment.keys.shape[0] for segment in main]
    if not 1 <= len(lengths) <= 3 or lengths != [segment.keys.shape[0] for segment in camera] or 0 in lengths:
        raise ValueError(f"{what}: expected one to three segments of at least one key, as long in both branches, found {lengths}")
    if D % 8 or D > 128:
        raise ValueError(f"{what}: expected a head width up to 128 and a multiple of 8, found {D}")
    arguments: dict[str, Any] = {f"n{i}": n for i, n in enumerate(lengths)} | {"main_scale": float(main_scale), "camera_scale": float(camera_scale)}
    tensors = {"main_q": main_q_NHD, "camera_q": camera_q_NHD}
    for i in range(len(lengths)):
        for branch, segments in (("main", main), ("camera", camera)):
            tensors |= {f"{branch}_k{i}": segments[i].keys, f"{branch}_v{i}": segments[i].values}
    for name, x in tensors.items():
        type_name(x, f"{what} {name}", ("bf16",))
        _heads(x[None], (1, N if name.endswith("_q") else arguments[f"n{name[-1]}"], H, D), f"{what} {name}")
        if x.stride(0) % 8 or x.data_ptr() % 16:
            raise ValueError(f"{what} {name}: expected rows at multiples of 16 bytes, found strides {x.stride()}")
        arguments |= {name: x, f"{name}_at": x, f"{name}_row": x.stride(0)}
    _check_ucpe(ucpe, 1, N, D, what)
    request = _request(quantize, D, what)
    chosen = tile or table.pair_tile(target(device))
    # The interpreter stands in for a GPU of four multiprocessors.
    programs = max(1, multiprocessors(device) // 2)
    for name, (shape, dtype) in plans.pair_scratch(N, H, D, chosen, programs).items():
        arguments[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    main_out = torch.empty(N, H * D, dtype=torch.bfloat16, device=device)
    camera_out = torch.empty_like(main_out) if request["keep"] else None
    quantized = empty_quantized((N, H * D), quantize, device)
    arguments |= {"N": N, "programs": programs, "rays": ucpe.rays, "cos": ucpe.cos, "sin": ucpe.sin, "main_out": main_out, "camera_out": camera_out}
    launch(plans.window_pair(H, D, len(lengths), chosen), arguments)
    finish = plans.finish_pair(H, D, len(lengths), chosen, native=native_fp4(device), **request)
    launch(finish, arguments | quantized_arguments(quantized, quantize, device))
    return main_out, Output(camera_out, quantized)


def _check_ucpe(ucpe: InverseUCPE, B: int, N: int, D: int, what: str) -> int:
    """Tokens a batch where each has its own matrices, else 0."""
    if tuple(ucpe.rays.shape) not in ((B, N, 4, 4), (1, N, 4, 4)) or ucpe.rays.dtype != torch.float32 or not ucpe.rays.is_contiguous():
        raise ValueError(
            f"{what}: expected contiguous float32 ray matrices ({B} or 1, {N}, 4, 4), found {tuple(ucpe.rays.shape)} {ucpe.rays.dtype}"
        )
    for angles in (ucpe.cos, ucpe.sin):
        if tuple(angles.shape) != (N, D // 4) or angles.dtype != torch.float32 or not angles.is_contiguous():
            raise ValueError(f"{what}: expected contiguous float32 angle angless ({N}, {D // 4}), found {tuple(angles.shape)} {angles.dtype}")
    return N if ucpe.rays.shape[0] == B and B > 1 else 0


def _request(quantize: Quantize | None, D: int, what: str) -> dict[str, Any]:
    if quantize is None:
        return {"keep": True}
    if quantize.kind == "fp8_rows" or (quantize.kind == "nvfp4" and D % 16):
        raise ValueError(f"{what}: expected fp8, or nvfp4 with heads of a multiple of 16 channels, found {quantize.kind} with {D}")
    return {"quant": quantize.kind, "swizzled": quantize.layout == "swizzled", "keep": quantize.keep}


def cross_attention(
    q_BNC: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    mask_BL: Tensor,
    q_norm_C: Tensor,
    eps: float,
    *,
    squares: Tensor | None = None,
    quantize: Quantize | None = None,
) -> Output:
    """See `naive.cross_attention`; `squares` spares the kernel its own pass over the rows."""
    what = "cross_attention"
    B, L, H, D = _heads(k_BLHD, (None,) * 4, f"{what} keys").shape
    _heads(v_BLHD, (B, L, H, D), f"{what} values")
    if q_BNC.dim() != 3 or q_BNC.shape[0] != B or q_BNC.shape[2] != H * D or q_BNC.stride(2) != 1:
        raise ValueError(
            f"{what}: expected queries ({B}, N, {H * D}) with adjacent channels, found {tuple(q_BNC.shape)} with strides {q_BNC.stride()}"
        )
    if D % 8 or D > 128:
        raise ValueError(f"{what}: expected a head width up to 128 and a multiple of 8, found {D}")
    if tuple(mask_BL.shape) != (B, L) or mask_BL.dtype != torch.bool or not mask_BL.is_contiguous():
        raise ValueError(f"{what}: expected a contiguous bool mask ({B}, {L}), found {tuple(mask_BL.shape)} {mask_BL.dtype}")
    if k_BLHD.dtype != q_BNC.dtype or v_BLHD.dtype != q_BNC.dtype:
        raise ValueError(f"{what}: expected one dtype, found {q_BNC.dtype}, {k_BLHD.dtype} and {v_BLHD.dtype}")
    N = q_BNC.shape[1]
    if squares is not None and (squares.shape[:2] != (B, N) or squares.dtype != torch.float32 or not squares.is_contiguous()):
        raise ValueError(
            f"{what}: expected contiguous float32 partial squares ({B}, {N}, parts), found {tuple(squares.shape)} {squares.dtype}"
        )
    request = _request(quantize, D, what)
    kind = type_name(q_BNC, what)
    on, weight, parts = target(q_BNC.device), type_name(q_norm_C, f"{what} q_norm"), 0 if squares is None else squares.shape[2]
    roles = plans.roles_fit(on, kind, D, L, parts, request.get("quant"), B)
    if roles:
        variant = plans.cross_roles(weight, H, D, L, eps, parts)
    else:
        tile = table.tile("cross", on, kind, request.get("quant"))
        variant = plans.cross_attention(kind, weight, H, D, eps, tile, parts=parts, native=native_fp4(q_BNC.device), **request)
    out = torch.empty(B, N, H * D, dtype=q_BNC.dtype, device=q_BNC.device) if request["keep"] else None
    quantized = empty_quantized((B, N, H * D), quantize, q_BNC.device)
    arguments: dict[str, Any] = {
        "q": q_BNC[0].unflatten(1, (H, D)) if roles else q_BNC, "q_row": q_BNC.stride(1), "q_batch": q_BNC.stride(0), "k": k_BLHD, "v": v_BLHD,
        "k_row": k_BLHD.stride(1), "k_batch": k_BLHD.stride(0), "v_row": v_BLHD.stride(1), "v_batch": v_BLHD.stride(0),
        "mask": mask_BL.view(torch.uint8), "q_norm": vector(q_norm_C, H * D, f"{what} q_norm"), "N": N, "L": L, "softmax_scale": D**-0.5,
    }  # fmt: skip
    arguments |= ({} if squares is None else {"squares": squares}) | ({} if out is None else {"out": out})
    launch(variant, arguments | quantized_arguments(quantized, quantize, q_BNC.device), BATCH=B, SMS=multiprocessors(q_BNC.device))
    return Output(out, quantized)

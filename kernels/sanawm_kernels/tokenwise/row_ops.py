"""Host side of the row kernels; signatures and results are those of `naive`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.quant.formats import Nvfp4Tensor
from sanawm_kernels.quant.request import Output, Quantize, empty_quantized
from sanawm_kernels.tokenwise import plans
from sanawm_kernels.tokenwise.launch import launch, matching_rows, native_fp4, rows, same, type_name, vector
from sanawm_kernels.tokenwise.naive import LAYER_NORM_EPS


def quantized_arguments(quantized: Any, request: Quantize | None, device: torch.device) -> dict[str, Any]:
    """Kernel arguments of quantized outputs."""
    if request is None:
        return {}
    arguments = {"codes": quantized.packed if isinstance(quantized, Nvfp4Tensor) else quantized.values}
    if request.scale is None:
        return arguments | {"scales": quantized.scale}
    if request.scale.device != device:
        raise ValueError(f"quantize: expected the scale on {device}, found it on {request.scale.device}")
    if isinstance(quantized, Nvfp4Tensor):
        arguments["scales"] = quantized.scales
    return arguments | {"quant_scale": request.scale}


def quantized_plan(request: Quantize | None, device: torch.device) -> dict[str, Any]:
    """Plan parameters of a request."""
    if request is None:
        return {"keep": True}
    return {"quant": request.kind, "swizzled": request.layout == "swizzled", "native": native_fp4(device), "keep": request.keep}


def _frame_rows(x_BTC: Tensor, frames: int, channels: int, what: str) -> Tensor:
    flat = rows(x_BTC, what)
    if flat.shape != (frames, channels):
        raise ValueError(f"{what}: expected {frames} rows of {channels}, one a frame, found shape {tuple(x_BTC.shape)}")
    return flat


def _update(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    extra: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    request: Quantize | None,
    what: str,
) -> tuple[Tensor | None, Output]:
    if x.dim() != 3:
        raise ValueError(f"{what}: expected x of shape (B, N, C), found {tuple(x.shape)}")
    B, N, C = x.shape
    flat = rows(x, f"{what} x")
    same(what, x, branch, extra)
    same(what, gate, shift, scale)
    arguments: dict[str, Any] = {"x": flat, "x_row": flat.stride(0)}
    for name, value in (("branch", branch), ("extra", extra)):
        if value is not None:
            value = matching_rows(value, (B, N, C), f"{what} {name}")
            arguments |= {name: value, f"{name}_row": value.stride(0)}
    frames = None
    modulation = None
    for name, value in (("gate", gate), ("shift", shift), ("scale", scale)):
        if value is None:
            continue
        if frames is None:
            frames = value.shape[1] if value.dim() == 3 else 0
            if frames == 0 or N % frames:
                raise ValueError(f"{what}: expected {name} of shape (B, T, C) with {N} tokens in whole frames, found {tuple(value.shape)}")
        value = _frame_rows(value, B * frames, C, f"{what} {name}")
        arguments |= {name: value, f"{name}_row": value.stride(0)}
        modulation = type_name(value, f"{what} {name}")
    stream = torch.empty(B, N, C, dtype=x.dtype, device=x.device) if branch is not None or extra is not None else None
    parameters = quantized_plan(request, x.device)
    keep = parameters.pop("keep") and shift is not None
    out = torch.empty(B, N, C, dtype=x.dtype, device=x.device) if keep else None
    quantized = empty_quantized((B, N, C), request, x.device)
    variant = plans.update_rows(
        type_name(x, f"{what} x"), C, N // frames if frames else N, branch=branch is not None, gate=gate is not None, extra=extra is not None,
        modulate=shift is not None, modulation=modulation, keep=keep, eps=LAYER_NORM_EPS, **parameters,
    )  # fmt: skip
    arguments |= {name: value for name, value in (("updated", stream), ("out", out)) if value is not None}
    launch(variant, arguments | quantized_arguments(quantized, request, x.device), ROWS=B * N)
    return stream, Output(out, quantized)


def modulate(x_BNC: Tensor, shift_BTC: Tensor, scale_BTC: Tensor, *, quantize: Quantize | None = None) -> Output:
    """See `naive.modulate`."""
    return _update(x_BNC, None, None, None, shift_BTC, scale_BTC, quantize, "modulate")[1]


def residual(
    x_BNC: Tensor,
    branch_BNC: Tensor | None = None,
    gate_BTC: Tensor | None = None,
    extra_BNC: Tensor | None = None,
    *,
    quantize: Quantize | None = None,
) -> Output:
    """See `naive.residual`."""
    if branch_BNC is None and (extra_BNC is None or gate_BTC is not None):
        raise ValueError("residual: expected a branch or an extra summand to add, and a gate only with a branch")
    stream, output = _update(x_BNC, branch_BNC, gate_BTC, extra_BNC, None, None, quantize, "residual")
    return Output(stream, output.quantized)


def residual_modulate(
    x_BNC: Tensor,
    branch_BNC: Tensor | None,
    gate_BTC: Tensor | None,
    extra_BNC: Tensor | None,
    shift_BTC: Tensor,
    scale_BTC: Tensor,
    *,
    quantize: Quantize | None = None,
) -> tuple[Tensor, Output]:
    """See `naive.residual_modulate`."""
    if branch_BNC is None and (extra_BNC is None or gate_BTC is not None):
        raise ValueError("residual_modulate: expected a branch or an extra summand to add, and a gate only with a branch")
    stream, output = _update(x_BNC, branch_BNC, gate_BTC, extra_BNC, shift_BTC, scale_BTC, quantize, "residual_modulate")
    assert stream is not None
    return stream, output


def quantize_activations(x: Tensor, quantize: Quantize) -> Output:
    """See `naive.quantize_activations`."""
    flat = rows(x, "quantize_activations x")
    quantized = _update(flat.unsqueeze(0), None, None, None, None, None, quantize, "quantize_activations")[1].quantized
    assert quantized is not None
    shaped: Any
    if isinstance(quantized, Nvfp4Tensor):
        scales = quantized.scales if quantize.layout == "swizzled" else quantized.scales.view(*x.shape[:-1], -1)
        shaped = Nvfp4Tensor(quantized.packed.view(*x.shape[:-1], -1), scales, quantized.global_scale, quantize.layout)
    else:
        scale = quantized.scale if quantized.scale.dim() == 0 else quantized.scale.view(x.shape[:-1])
        shaped = type(quantized)(quantized.values.view(x.shape), scale)
    return Output(x if quantize.keep else None, shaped)


def output_gate(main: Tensor, gate: Tensor, camera: Tensor | None = None, *, quantize: Quantize | None = None) -> Output:
    """See `naive.output_gate`."""
    same("output_gate", main, gate, camera)
    shape = tuple(main.shape)
    flat = {"main": rows(main, "output_gate main"), "gate": matching_rows(gate, shape, "output_gate gate")}
    if camera is not None:
        flat["camera"] = matching_rows(camera, shape, "output_gate camera")
    parameters = quantized_plan(quantize, main.device)
    out = torch.empty(shape, dtype=main.dtype, device=main.device) if parameters["keep"] else None
    quantized = empty_quantized(shape, quantize, main.device)
    variant = plans.gate_rows(type_name(main, "output_gate main"), shape[-1], camera=camera is not None, **parameters)
    arguments: dict[str, Any] = dict(flat) | {f"{name}_row": value.stride(0) for name, value in flat.items()}
    arguments |= {} if out is None else {"out": out}
    launch(variant, arguments | quantized_arguments(quantized, quantize, main.device), ROWS=flat["main"].shape[0])
    return Output(out, quantized)


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """See `naive.rms_norm`."""
    flat = rows(x, "rms_norm x")
    weight = vector(weight_C, flat.shape[1], "rms_norm weight")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    variant = plans.norm_rows(type_name(x, "rms_norm x"), type_name(weight, "rms_norm weight"), flat.shape[1], eps)
    launch(variant, {"x": flat, "x_row": flat.stride(0), "weight": weight, "out": out}, ROWS=flat.shape[0])
    return out

"""Plain definition of each kernel, reading and writing the arguments of its launch.

A kernel of several launches is defined by its last one, on the union of their arguments. M tokens, K depth, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_export.cuda import encoder_definitions
from sanawm_kernels.attention import naive as attention
from sanawm_kernels.attention.naive import InverseUCPE, Segment
from sanawm_kernels.chunk import naive as chunk
from sanawm_kernels.conv import naive as conv
from sanawm_kernels.conv.plans import MODES
from sanawm_kernels.gdn import naive as gdn
from sanawm_kernels.gdn.naive import Gates
from sanawm_kernels.numerics import wide
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive as tokenwise
from sanawm_kernels.tokenwise.plans import QUANT_CODES

Arguments = Mapping[str, Any]
_KINDS = {code: kind for kind, code in QUANT_CODES.items()}


def _batched(x: Tensor | None) -> Any:
    return None if x is None else x.unsqueeze(0)


def _request(a: Arguments, c: Arguments) -> Quantize | None:
    """The quantization that a launch asks for."""
    kind = _KINDS[c.get("QUANT", 0)]
    if kind is None:
        return None
    scale = None if kind == "fp8_rows" else a["quant_scale"].reshape(())
    return Quantize(kind, scale, "swizzled" if c.get("SWIZZLED") else "rows", keep="out" in a)  # type: ignore[arg-type]


def _store(a: Arguments, plain: Tensor | None, quantized: Fp8Tensor | Nvfp4Tensor | None) -> None:
    if "out" in a and plain is not None:
        a["out"].copy_(plain.reshape(a["out"].shape))
    if isinstance(quantized, Fp8Tensor):
        a["codes"].copy_(quantized.values.reshape(a["codes"].shape))
        if "scales" in a:
            a["scales"].copy_(quantized.scale.reshape(a["scales"].shape))
    elif quantized is not None:
        a["codes"].copy_(quantized.packed.reshape(a["codes"].shape))
        a["scales"].copy_(quantized.scales.reshape(a["scales"].shape))


def update_rows(a: Arguments, c: Arguments) -> None:
    x = a["x"].unsqueeze(0)
    request = _request(a, c)
    if "branch" in a or "extra" in a:
        stream = tokenwise.residual(x, _batched(a.get("branch")), _batched(a.get("gate")), _batched(a.get("extra"))).plain
        assert stream is not None
        a["updated"].copy_(stream[0])
        x = stream
    if "shift" in a:
        _store(a, *tokenwise.modulate(x, _batched(a["shift"]), _batched(a["scale"]), quantize=request))
    elif request is not None:
        _store(a, None, tokenwise.quantize_activations(x, request).quantized)


def norm_rows(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(tokenwise.rms_norm(a["x"], a["weight"], c["EPS"]))


def depthwise_glu(a: Arguments, c: Arguments) -> None:
    _store(a, *tokenwise.depthwise_glu(_batched(a["x"]), a["taps"], a["bias"], (c["H"], c["W"]), quantize=_request(a, c)))


def rope_heads(a: Arguments, c: Arguments) -> None:
    q, k = tokenwise.rope_heads(_batched(a["q"]), _batched(a["k"]), a["q_norm"], a["k_norm"], a["cos"], a["sin"], c["HEADS"], c["EPS"])
    a["q_out"].copy_(q.flatten(2)[0])
    a["k_out"].copy_(k.flatten(2)[0])


def ucpe_heads(a: Arguments, c: Arguments) -> None:
    q, k, v = (_batched(a[name]) for name in ("q", "k", "v"))
    turned = tokenwise.ucpe_heads(
        q, k, v, a["q_norm"], a["k_norm"], a["rays"], a["rays_inverse"], a["cos"], a["sin"], c["HEADS"], c["EPS"], clamp=c["CLAMP"]
    )
    for name, value in zip(("q_out", "k_out", "v_out"), turned):
        a[name].copy_(value.flatten(2)[0])


def _heads(x: Tensor, c: Arguments) -> Tensor:
    return x.unsqueeze(0).unflatten(-1, (c["HEADS"], -1))


def window_attention(a: Arguments, c: Arguments) -> None:
    segments = [Segment(_heads(a[f"k{i}"], c), _heads(a[f"v{i}"], c)) for i in range(3) if f"k{i}" in a]
    ucpe = InverseUCPE(a["rays"], a["cos"], a["sin"]) if "rays" in a else None
    _store(a, *attention.window_attention(_heads(a["q"], c), segments, a["softmax_scale"], ucpe=ucpe, quantize=_request(a, c)))


def finish_pair(a: Arguments, c: Arguments) -> None:
    def branch(name: str) -> list[Segment]:
        return [Segment(_batched(a[f"{name}_k{i}"]), _batched(a[f"{name}_v{i}"])) for i in range(3) if f"{name}_k{i}" in a]

    ucpe = InverseUCPE(a["rays"], a["cos"], a["sin"])
    main = attention.window_attention(_batched(a["main_q"]), branch("main"), a["main_scale"])
    _store({"out": a["main_out"]}, *main)
    camera = attention.window_attention(_batched(a["camera_q"]), branch("camera"), a["camera_scale"], ucpe=ucpe, quantize=_request(a, c))
    _store({**a, **({"out": a["camera_out"]} if "camera_out" in a else {})}, *camera)


def cross_attention(a: Arguments, c: Arguments) -> None:
    q, k, v, mask = a["q"].flatten(1), _heads(a["k"].flatten(1), c), _heads(a["v"].flatten(1), c), a["mask"].bool()
    if "squares" in a:  # what the product measured must be what the definition would measure
        torch.testing.assert_close(a["squares"].double().sum(1), q.double().square().sum(1), rtol=1e-4, atol=1e-6)
    _store(a, *attention.cross_attention(_batched(q), k, v, mask, a["q_norm"], c["EPS"], quantize=_request(a, c)))


def block_gdn(a: Arguments, c: Arguments) -> None:
    chunks, scale = (c["T"],), c["KEY_SCALE"]
    gates = Gates(_batched(a["beta"]), _batched(a["decay"]), a["A_log"], a["dt_bias"])
    q, k, v = (_batched(a[f"main_{n}"]) for n in ("q", "k", "v"))
    cam_q, cam_k, cam_v = (_batched(a[f"camera_{n}"]) for n in ("q", "k", "v"))
    state = camera_state = None
    if "main_state_in" in a:
        state = (a["main_state_in"], a["z_in"], a["main_tail_in"])
        camera_state = (a["camera_state_in"], a["camera_tail_in"])
    out, s, z, tail = gdn.main_gdn(
        q, k, v, gates, a["main_conv"], a["main_q_norm"], a["main_k_norm"], a["cos"], a["sin"], chunks=chunks, key_scale=scale, state=state
    )
    cam, s_cam, cam_tail = gdn.camera_gdn(
        cam_q, cam_k, cam_v, gates, a["camera_conv"], a["camera_q_norm"], a["camera_k_norm"], a["rays"], a["rays_inverse"],
        a["camera_cos"], a["camera_sin"],
        chunks=chunks, key_scale=scale, clamp=c["CLAMP"], carry=c["CAMERA_CARRY"], state=camera_state,
    )  # fmt: skip
    a["main_out"].copy_(out[0])
    a["camera_out"].copy_(cam[0])
    for name, value in (("main_state", s), ("z", z), ("camera_state", s_cam), ("main_tail", tail), ("camera_tail", cam_tail)):
        if f"{name}_out" in a:
            a[f"{name}_out"].copy_(value)


def _dequantized(values: Tensor, a: Arguments, operand: str, c: Arguments) -> Tensor:
    """An operand of a product in at least float32."""
    scale = a.get(f"{operand}_scale")
    if c.get("FP4"):
        assert scale is not None
        return Nvfp4Tensor(values, a[f"{operand}_scales"], scale.reshape(())).dequantize()
    result = wide(values) if values.dtype != torch.float8_e4m3fn else values.float()
    if scale is None:
        return result
    return result * (scale.unsqueeze(1) if scale.numel() > 1 else scale)


def _finish(acc: Tensor, a: Arguments, c: Arguments) -> None:
    if "bias" in a:
        acc = acc + wide(a["bias"])
    if c.get("SILU"):
        acc = F.silu(acc)
    if "add" in a:
        acc = acc + wide(a["add"])
    if "gate" in a:
        acc = acc * F.silu(wide(a["gate"]))
    if "frame_gate" in a:
        tokens = c["TOKENS"] if "TOKENS" in c else c["FRAME"]
        acc = acc * wide(a["frame_gate"]).repeat_interleave(tokens, 0)
    for name in ("residual", "extra"):
        if name in a:
            acc = acc + wide(a[name])
    if c["BF16"]:
        acc = acc.bfloat16()
    if "out" in a:
        a["out"].copy_(acc)
    if "squares" in a:
        parts = a["squares"].shape[1]
        width = c["BN"] // c["SLICES"]
        padded = F.pad(wide(acc).square(), (0, parts * width - acc.shape[1]))
        a["squares"].copy_(padded.unflatten(1, (parts, width)).sum(2))
    if (request := _request(a, c)) is not None:
        _store({n: v for n, v in a.items() if n != "out"}, None, tokenwise.quantize_activations(acc, request).quantized)


def gemm(a: Arguments, c: Arguments) -> None:
    _finish(_dequantized(a["a"], a, "a", c) @ _dequantized(a["b"], a, "b", c).t(), a, c)


def temporal_conv(a: Arguments, c: Arguments) -> None:
    x = _dequantized(a["a"], a, "a", c)
    weight = _dequantized(a["b"], a, "b", c)
    S, zero = c["FRAME"], torch.zeros_like(x[: c["FRAME"]])
    product = torch.cat((torch.cat((zero, x[:-S])), x, torch.cat((x[S:], zero))), 1) @ weight.t()
    if "carried" in a:
        product[:S] += wide(a["carried"])
    _finish(product, a, c)


def pingpong(a: Arguments, c: Arguments, slices: int = 1) -> None:
    constants = {**c, "FRAME": c["TOKENS"], "SLICES": slices, "BF16": True}
    (gemm if c["TAPS"] == 1 else temporal_conv)(a, constants)


def wide_product(a: Arguments, c: Arguments) -> None:
    pingpong(a, c, 2)


def transpose(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(chunk.transpose(a["x"], a["out"].dtype))


def modulation_rows(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(chunk.modulation_rows(a["timestep"].reshape(-1), a["steps"], a["table"]))


def ray_matrices(a: Arguments, c: Arguments) -> None:
    rays, inverse = chunk.ray_matrices(a["camera"].reshape(-1, 20), c["H"], c["W"])
    a["rays"].copy_(rays.reshape(a["rays"].shape))
    a["inverse"].copy_(inverse.reshape(a["inverse"].shape))


def rope_table(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(chunk.rope_table(a["time"], a["rows"], a["columns"], (c["K0"], c["K1"], c["K2"])))


def gelu(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(chunk.gelu(a["x"]))


def latent_rows(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(conv.latent_rows(a["z"].reshape(a["C"], a["S"]), a["mean"], a["std"]))


def norm_silu(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(conv.norm_silu(a["x"]))
    if "state" in a:
        a["state"].copy_(a["out"][a["KEPT"] :])


def causal_conv(a: Arguments, c: Arguments) -> None:
    T, H, W = c["T"], c["H"], c["W"]
    x = a["x"].reshape(T, H, W, -1)
    past = a["past"].reshape(2, H, W, -1) if "past" in a else None
    y = conv.causal_conv(x, past, a["weight"], a["bias"])
    if c["MODE"] == MODES["upsample"]:
        y = conv.upsampled(y, x, past is None)
    elif c["MODE"] == MODES["pixels"]:
        y = conv.pixels(y.to(x.dtype), c["PATCH"])
    elif c["MODE"] == MODES["residual"]:
        y = y + wide(a["residual"]).reshape(y.shape)
    a["out"].copy_(y.reshape(a["out"].shape))


def padded_frames(a: Arguments, c: Arguments) -> None:
    x = a["x"].reshape(c["T"], c["H"], c["W"], c["C"])
    past = a["past"].reshape(2, *x.shape[1:]) if "past" in a else None
    out = conv.padded(conv.norm_silu(x) if c["NORM"] else x, past)
    a["out"].copy_(out.reshape(a["out"].shape))
    a["state"].copy_(out[-2:, 1:-1, 1:-1].reshape(a["state"].shape))


def _pitched(x: Tensor, c: Arguments) -> Tensor:
    """The pixels of frames (frames * STRIDE, C) whose rows are W + 2 pixels apart."""
    return conv.frames(x, x.shape[0] // c["STRIDE"], c["H"], c["W"], c["W"] + 2)


def described_conv(a: Arguments, c: Arguments) -> None:
    T, H, W = c["T"], c["H"], c["W"]
    y = conv.padded_conv(a["x"].reshape(T + 2, H + 2, W + 2, -1), a["weight"], a.get("bias"))
    if c["MODE"] == MODES["upsample"]:
        y = conv.upsampled(y, _pitched(a["skip"], c), c["FIRST"])
    elif c["MODE"] == MODES["pixels"]:
        y = conv.pixels(y.to(a["x"].dtype), c["PATCH"]).reshape(a["out"].shape)
    elif "skip" in a:
        y = y + wide(_pitched(a["skip"], c))
    out = a["out"]
    if c["MODE"] not in (MODES["upsample"], MODES["pixels"]):
        # What lies between rows is computed like the rest and never read: a number that nothing else makes.
        out = _pitched(out.fill_(-77777), c)
    # All in the first part of several.
    out.zero_()[: len(y)] = y


def summed_parts(a: Arguments, c: Arguments) -> None:
    y = a["parts"].unflatten(0, (c["SPLITS"], -1)).sum(0) + wide(a["bias"])
    a["out"].copy_(y + wide(a["residual"]) if "residual" in a else y)


def selection(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(conv.selection(c["N"], c["C"], c["UPSAMPLE"]))


DEFINITIONS: Mapping[str, Callable[[Arguments, Arguments], None]] = {
    "sanawm_kernels.tokenwise.rows:update_rows": update_rows,
    "sanawm_kernels.tokenwise.rows:norm_rows": norm_rows,
    "sanawm_kernels.tokenwise.depthwise:depthwise_glu": depthwise_glu,
    "sanawm_kernels.tokenwise.depthwise_hopper:depthwise_glu": depthwise_glu,
    "sanawm_kernels.tokenwise.heads:rope_heads": rope_heads,
    "sanawm_kernels.tokenwise.heads:ucpe_heads": ucpe_heads,
    "sanawm_kernels.attention.kernels:window_attention": window_attention,
    "sanawm_kernels.attention.finish:finish_pair": finish_pair,
    "sanawm_kernels.attention.cross:cross_attention": cross_attention,
    "sanawm_kernels.attention.cross_roles:cross_attention": cross_attention,
    "sanawm_kernels.gdn.apply:apply": block_gdn,
    "sanawm_kernels.gemm.kernels:gemm": gemm,
    "sanawm_kernels.gemm.kernels:temporal_conv": temporal_conv,
    "sanawm_kernels.gemm.tma:gemm": gemm,
    "sanawm_kernels.gemm.tma:temporal_conv": temporal_conv,
    "sanawm_kernels.gemm.pingpong:gemm": pingpong,
    "sanawm_kernels.gemm.wide:gemm": wide_product,
    "sanawm_kernels.chunk.kernels:transpose": transpose,
    "sanawm_kernels.chunk.kernels:modulation_rows": modulation_rows,
    "sanawm_kernels.chunk.kernels:ray_matrices": ray_matrices,
    "sanawm_kernels.chunk.kernels:rope_table": rope_table,
    "sanawm_kernels.chunk.kernels:gelu": gelu,
    "sanawm_kernels.conv.kernels:latent_rows": latent_rows,
    "sanawm_kernels.conv.kernels:norm_silu": norm_silu,
    "sanawm_kernels.conv.kernels:causal_conv": causal_conv,
    "sanawm_kernels.conv.tma:causal_conv": described_conv,
    "sanawm_kernels.conv.frames:padded": padded_frames,
    "sanawm_kernels.conv.frames:summed": summed_parts,
    "sanawm_kernels.conv.frames:selection": selection,
    **encoder_definitions.DEFINITIONS,
}

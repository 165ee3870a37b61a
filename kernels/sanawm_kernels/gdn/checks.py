"""Checks of the fused gated delta network's inputs, and the call's sizes derived from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sanawm_kernels.gdn.arguments import CameraBranch, GDNState, MainBranch
from sanawm_kernels.gdn.naive import Gates
from sanawm_kernels.gdn.plans import MAX_FRAMES, PRECISIONS, Problem
from sanawm_kernels.tokenwise.launch import TYPE_NAMES

_KINDS = (torch.bfloat16, torch.float32)


def problem(
    main: MainBranch | None,
    camera: CameraBranch | None,
    gates: Gates,
    chunks: Sequence[int],
    key_scale: float,
    state: GDNState | None,
    commit: bool,
    precision: str | None,
) -> Problem:
    """The call's sizes and form; ValueError or TypeError with what was expected and found where the inputs do not fit."""
    branches = [branch for branch in (main, camera) if branch is not None]
    if not branches:
        raise ValueError("expected a main branch, a camera branch or both, found neither")
    if len(chunks) != 1 or not 1 <= chunks[0] <= MAX_FRAMES:
        found = f"found chunks {tuple(chunks)}; use the plain definition for other schedules"
        raise ValueError(f"expected one chunk of 1 to {MAX_FRAMES} frames, {found}")
    q = branches[0].q
    if q.dim() != 3 or q.dtype not in _KINDS:
        raise TypeError(f"q: expected bfloat16 or float32 of shape (B, N, C), found {q.dtype} of shape {tuple(q.shape)}")
    (B, N, C), T, H = q.shape, chunks[0], gates.A_log.shape[0]
    if N % T or C % H or C // H % 8:
        found = f"found N {N} with {T} frames and C {C} with {H} heads"
        raise ValueError(f"expected N = frames x tokens and C = heads x width (a multiple of 8), {found}")
    S, D = N // T, C // H
    kind = TYPE_NAMES[q.dtype]
    if precision is None:
        precision = "bf16" if kind == "bf16" else "ieee"
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, found '{precision}'")
    if kind == "bf16" and q.device.type == "cpu" and not _exact_interpreter():
        raise ValueError("Triton's interpreter computes bfloat16 wrongly; use float32 inputs, or `sanawm_kernels.quant.interpreter.exact`")
    result = Problem(
        B, H, D, T, S, key_scale, kind=kind, weight_kind=TYPE_NAMES.get(branches[0].q_norm.dtype, "?"),
        gate_kind=TYPE_NAMES.get(gates.A_log.dtype, "?"), precision=precision, has_state=state is not None, commit=commit,
        main=main is not None, camera=camera is not None, clamp=camera is not None and camera.clamp,
        camera_carry=camera is None or camera.carry,
    )  # fmt: skip
    for branch in branches:
        _check_branch("main" if branch is main else "camera", branch, result, q, branches[0].q_norm.dtype)
    _check_gates(gates, result, q)
    if state is not None:
        _check_state(state, result, q)
    return result


def _exact_interpreter() -> bool:
    """Whether the interpreter's bfloat16 products have been mended."""
    from triton.runtime import interpreter

    return interpreter.InterpreterBuilder.create_dot.__module__ != interpreter.__name__


def _exactly(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} tensor of shape {shape} on {device}, "
            f"found {x.dtype} of shape {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _rows(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """x: slices of rows, of one dtype and device with `like` and with its strides."""
    if tuple(x.shape) != shape or x.dtype != like.dtype or x.device != like.device or x.stride() != like.stride() or x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected {like.dtype} of shape {shape} on {like.device} with strides {like.stride()} and adjacent channels, "
            f"found {x.dtype} of shape {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )
    if x.data_ptr() % 16 or any(x.stride(i) * x.element_size() % 16 for i in (0, 1)):
        raise ValueError(f"{name}: expected rows at multiples of 16 bytes, found address {x.data_ptr():#x} and strides {x.stride()}")


def _check_branch(name: str, branch: MainBranch | CameraBranch, p: Problem, q: Tensor, weights: torch.dtype) -> None:
    C, D, N, device = p.channels, p.head_dim, p.frames * p.tokens, q.device
    for field in ("q", "k", "v"):
        _rows(f"{name} {field}", getattr(branch, field), (p.batch, N, C), branch.q)
    if branch.q.dtype != q.dtype or branch.q.device != device:
        raise ValueError(f"expected both branches in one dtype on one device, found {q.dtype} on {device} and {branch.q.dtype} on {branch.q.device}")
    if weights not in _KINDS:
        raise TypeError(f"{name} q_norm: expected bfloat16 or float32, found {weights}")
    _exactly(f"{name} conv", branch.conv, (C, 4), weights, device)
    for field in ("q_norm", "k_norm"):
        _exactly(f"{name} {field}", getattr(branch, field), (C,), weights, device)
    pairs = D // 4 if isinstance(branch, CameraBranch) else D // 2
    for field in ("cos", "sin"):
        _exactly(f"{name} {field}", getattr(branch, field), (N, pairs), torch.float32, device)
    if isinstance(branch, CameraBranch):
        sets = branch.rays.shape[0] if branch.rays.dim() == 4 else 0
        if sets not in (1, p.batch):
            raise ValueError(f"rays: expected shape ({p.batch} or 1, {N}, 4, 4), found {tuple(branch.rays.shape)}")
        for field in ("rays", "rays_inverse"):
            _exactly(field, getattr(branch, field), (sets, N, 4, 4), torch.float32, device)


def _check_gates(gates: Gates, p: Problem, q: Tensor) -> None:
    B, H, N = p.batch, p.heads, p.frames * p.tokens
    for name in ("beta_logits", "decay_logits"):
        x = getattr(gates, name)
        if tuple(x.shape) != (B, N, H) or x.dtype != q.dtype or x.device != q.device or x.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected {q.dtype} of shape {(B, N, H)} on {q.device} with adjacent heads, "
                f"found {x.dtype} of shape {tuple(x.shape)} with strides {x.stride()} on {x.device}"
            )
    if gates.A_log.dtype not in _KINDS:
        raise TypeError(f"A_log: expected bfloat16 or float32, found {gates.A_log.dtype}")
    for name in ("A_log", "dt_bias"):
        _exactly(name, getattr(gates, name), (H,), gates.A_log.dtype, q.device)


def _fields(p: Problem, kind: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the state's fields of the branches computed."""
    B, H, D = p.batch, p.heads, p.head_dim
    square, tail = ((B, H, D, D), torch.float32), ((B, 3, p.tokens, p.channels), kind)
    main = {"s": square, "z": ((B, H, D), torch.float32), "k_tail": tail} if p.main else {}
    return main | ({"s_cam": square, "cam_tail": tail} if p.camera else {})


def _check_state(state: GDNState, p: Problem, q: Tensor, what: str = "state") -> None:
    for field, (shape, dtype) in _fields(p, q.dtype).items():
        x = getattr(state, field)
        if x is None:
            raise ValueError(f"{what}.{field}: expected a tensor of shape {shape}, found None")
        _exactly(f"{what}.{field}", x, shape, dtype, q.device)


def new_state(p: Problem, q: Tensor, given: GDNState | None) -> GDNState:
    """Tensors for the new state: those given, checked, or new ones."""
    if given is not None:
        _check_state(given, p, q, "state_out")
        return given
    return GDNState(**{field: torch.empty(shape, dtype=dtype, device=q.device) for field, (shape, dtype) in _fields(p, q.dtype).items()})


def output(given: Tensor | None, q: Tensor, name: str) -> Tensor:
    """Tensor for a branch's output (B, N, C): the one given, checked, or a new one."""
    if given is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if given.shape != q.shape or given.dtype != q.dtype or given.device != q.device or given.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected {q.dtype} of shape {tuple(q.shape)} on {q.device} with adjacent channels, "
            f"found {given.dtype} of shape {tuple(given.shape)} with strides {given.stride()} on {given.device}"
        )
    if given.data_ptr() % 16 or any(given.stride(i) * given.element_size() % 16 for i in (0, 1)):
        raise ValueError(f"{name}: expected rows at multiples of 16 bytes, found address {given.data_ptr():#x} and strides {given.stride()}")
    return given

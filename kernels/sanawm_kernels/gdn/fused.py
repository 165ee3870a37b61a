"""Fused gated delta network of a block: both branches in four launches.

Shapes: B batch, T frames, S tokens a frame, N = T*S tokens, C channels, H heads, D = C/H head width. Inputs may be slices of one merged
projection (B, N, W): rows of adjacent channels at one distance. The plain definition is `sanawm_kernels.gdn.naive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sanawm_kernels import rotary
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.gdn import checks
from sanawm_kernels.gdn.arguments import BlockOutput, CameraBranch, GDNState, MainBranch
from sanawm_kernels.gdn.naive import Gates
from sanawm_kernels.gdn.plans import plan, row
from sanawm_kernels.gdn.workspace import scratch
from sanawm_kernels.tokenwise.launch import launch, target


@dataclass(frozen=True)
class Call:
    """A call whose buffers are in place: the launches in order with their arguments, and what they write."""

    launches: tuple[tuple[KernelVariant, dict[str, Any]], ...]
    output: BlockOutput

    def run(self) -> BlockOutput:
        """Enqueue the launches on the current stream."""
        for variant, arguments in self.launches:
            launch(variant, arguments)
        return self.output


def bind(
    main: MainBranch | None,
    camera: CameraBranch | None,
    gates: Gates,
    *,
    chunks: Sequence[int],
    key_scale: float,
    state: GDNState | None = None,
    commit: bool = True,
    precision: str | None = None,
    state_out: GDNState | None = None,
    main_out: Tensor | None = None,
    camera_out: Tensor | None = None,
) -> Call:
    """Check a call of `block_gdn`, allocate its scratch memory and outputs, and return it ready to run, any number of times."""
    problem = checks.problem(main, camera, gates, chunks, key_scale, state, commit, precision)
    q = main.q if main is not None else camera.q if camera is not None else gates.beta_logits
    settings = row(problem, "summarize", target(q.device)).settings
    B, H, T, S, D = problem.batch, problem.heads, problem.frames, problem.tokens, problem.head_dim
    shapes = scratch(B, H, T, S, D, problem.precision, settings)
    arguments: dict[str, Any] = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=q.device) for name, (shape, dtype) in shapes.items()
    }
    new = checks.new_state(problem, q, state_out) if commit else GDNState()
    arguments |= _gate_arguments(gates) | _state_arguments(state, new)
    outputs: dict[str, Tensor | None] = {"main": None, "camera": None}
    for name, branch, given in (("main", main, main_out), ("camera", camera, camera_out)):
        if branch is not None:
            out = outputs[name] = checks.output(given, branch.q, f"{name}_out")
            arguments |= _branch_arguments(name, branch, out)
    launches = tuple((variant, {name: arguments[name] for name in variant.signature}) for variant in plan(problem, target(q.device)))
    return Call(launches, BlockOutput(outputs["main"], outputs["camera"], new if commit else None))


def block_gdn(main: MainBranch | None, camera: CameraBranch | None, gates: Gates, **options: Any) -> BlockOutput:
    """One or both branches of a GDN block over one chunk of 1 to 5 frames, in four launches.

    gates: write-strength and decay logits (B, N, H) of each token, A_log and dt_bias (H,). Options, as in `bind`:
    chunks, key_scale: as in the plain definition. state: what the chunk before left, None at the start. commit: also write the new state, to
    `state_out` (which may be `state`: in place) or to new tensors; without it the call is read-only. precision: operands of the products,
    "bf16" (16 bits, default for bfloat16), "tf32" or "ieee" (default for float32); states and sums are float32 in all. Outputs are written to
    `main_out` and `camera_out` (B, N, C) where given.
    Raises ValueError for inputs that do not fit, TypeError for dtypes.
    """
    return bind(main, camera, gates, **options).run()


def _gate_arguments(gates: Gates) -> dict[str, Any]:
    arguments: dict[str, Any] = {"A_log": gates.A_log, "dt_bias": gates.dt_bias}
    for name, x in (("beta", gates.beta_logits), ("decay", gates.decay_logits)):
        arguments |= {name: x, f"{name}_batch": x.stride(0), f"{name}_row": x.stride(1)}
    return arguments


def _state_arguments(old: GDNState | None, new: GDNState) -> dict[str, Any]:
    fields = {"main_state": "s", "z": "z", "camera_state": "s_cam", "main_tail": "k_tail", "camera_tail": "cam_tail"}
    arguments = {f"{name}_out": getattr(new, field) for name, field in fields.items()}
    if old is not None:
        arguments |= {f"{name}_in": getattr(old, field) for name, field in fields.items()}
    return arguments


def _branch_arguments(name: str, branch: MainBranch | CameraBranch, out: Tensor) -> dict[str, Any]:
    tensors = {"q": branch.q, "k": branch.k, "v": branch.v, "conv": branch.conv, "q_norm": branch.q_norm, "k_norm": branch.k_norm, "out": out}
    arguments: dict[str, Any] = {f"{name}_{key}": value for key, value in tensors.items()}
    arguments |= {f"{name}_row": branch.q.stride(1), f"{name}_batch": branch.q.stride(0)}
    arguments |= {f"{name}_out_row": out.stride(1), f"{name}_out_batch": out.stride(0)}
    if isinstance(branch, CameraBranch):
        shared = branch.rays.shape[0] == 1
        rays = {"rays": branch.rays, "rays_inverse": branch.rays_inverse, "rays_batch": 0 if shared else branch.rays.stride(0)}
        return arguments | rays | {"camera_cos": branch.cos, "camera_sin": branch.sin}
    return arguments | {"cos": branch.cos, "sin": branch.sin}


def main_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    conv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunks: Sequence[int],
    key_scale: float,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Main branch alone; see `sanawm_kernels.gdn.naive.main_gdn`. One chunk of at most 5 frames."""
    carried = None if state is None else GDNState(s=state[0], z=state[1], k_tail=state[2])
    branch = MainBranch(q, k, v, conv, q_norm, k_norm, cos, sin)
    result = block_gdn(branch, None, gates, chunks=chunks, key_scale=key_scale, state=carried)
    assert result.main is not None and result.state is not None
    new = result.state
    assert new.s is not None and new.z is not None and new.k_tail is not None
    return result.main, new.s, new.z, new.k_tail


def camera_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    conv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rays: Tensor,
    rays_inverse: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunks: Sequence[int],
    key_scale: float,
    clamp: bool = False,
    carry: bool = True,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Camera branch alone; see `sanawm_kernels.gdn.naive.camera_gdn`. One chunk of at most 5 frames."""
    carried = None if state is None else GDNState(s_cam=state[0], cam_tail=state[1])
    branch = CameraBranch(q, k, v, conv, q_norm, k_norm, rays, rays_inverse, cos, sin, clamp, carry)
    result = block_gdn(None, branch, gates, chunks=chunks, key_scale=key_scale, state=carried)
    assert result.camera is not None and result.state is not None
    new = result.state
    assert new.s_cam is not None and new.cam_tail is not None
    return result.camera, new.s_cam, new.cam_tail


# For `sanawm_kernels.ops.implementation`.
FUSED = SimpleNamespace(main_gdn=main_gdn, camera_gdn=camera_gdn, ucpe=rotary.ucpe)

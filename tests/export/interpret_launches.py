"""Runs a GDN launch list in Triton's interpreter and prints its largest errors against the plain definition as JSON.

A process of its own: Triton decides at import whether to interpret.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from typing import Any

import torch

from sanawm_export.tensorrt.gdn_launches import Placed, gdn_launches, output_operands, state_operands
from sanawm_export.tensorrt.kernels import Compiled
from sanawm_kernels.aot.compile import load
from sanawm_kernels.gdn import naive
from sanawm_kernels.gdn.naive import Gates
from sanawm_kernels.gdn.plans import Problem
from sanawm_runtime.engines._trt_launch import Argument, Kernel, LaunchList, Operand

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER = b"\x7fELF\x02\x01\x01\x33\x07" + bytes(9) + struct.pack("<H", 190) + bytes(28) + struct.pack("<I", 80) + bytes(12)


def pretend(variants: Any) -> tuple[Compiled, ...]:
    """What a compiler would return, without the code: the interpreter runs the source."""
    kernel = [Kernel(v.name, "kernel", 32 * v.num_warps, 0, 0, HEADER) for v in variants]
    return tuple(Compiled(v, k, tuple(a for a in load(v.kernel).arg_names if a in v.signature)) for v, k in zip(variants, kernel, strict=True))


def run(launches: LaunchList, variants: list[Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a launch list; they and the workspace start as NaN."""
    outputs = [torch.full(o.shape, math.nan, dtype=getattr(torch, o.dtype)) for o in launches.outputs]
    workspace = torch.full((launches.workspace // 4,), math.nan).view(torch.uint8)
    for launch in launches.launches:
        variant = variants[launch.kernel]
        names = [a for a in load(variant.kernel).arg_names if a in variant.signature]
        given = {name: _value(a, variant.signature[name], inputs, outputs, workspace) for name, a in zip(names, launch.arguments, strict=True)}
        load(variant.kernel)[launch.grid](**given, **variant.constexprs, num_warps=variant.num_warps, num_stages=variant.num_stages)
    return outputs


def _value(argument: Argument, kind: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], workspace: torch.Tensor) -> Any:
    if argument.source not in ("input", "output", "workspace"):
        return argument.value
    base = workspace if argument.source == "workspace" else (inputs if argument.source == "input" else outputs)[argument.index].view(-1)
    dtype = TORCH[kind.strip("*").partition(":")[0]]
    if argument.source == "workspace":
        return base[int(argument.value) :].view(dtype)
    assert base.dtype == dtype, (argument, kind, base.dtype)
    return base[int(argument.value) // base.element_size() :]


def random_case(problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of a problem: projections, gates and weights in `dtype`, tables, rays and states in float32."""
    generator = torch.Generator().manual_seed(7)
    B, H, D, T, S, C = problem.batch, problem.heads, problem.head_dim, problem.frames, problem.tokens, problem.channels
    N = T * S

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    angle = random(N, D // 2)
    rays = torch.eye(4).expand(1, N, 4, 4) + 0.2 * random(1, N, 4, 4)
    rounded = {
        "qkv": random(B, N, 3 * C), "camera_q": random(B, N, C), "camera_k": random(B, N, C), "camera_v": random(B, N, C),
        "beta": random(B, N, H), "decay": random(B, N, H), "A_log": random(H), "dt_bias": random(H), "main_conv": random(C, 4), "main_q_norm": random(C),
        "main_k_norm": random(C), "camera_conv": random(C, 4), "camera_q_norm": random(C), "camera_k_norm": random(C),
    }  # fmt: skip
    exact = {
        "cos": angle.cos(), "sin": angle.sin(), "rays": rays, "rays_inverse": torch.linalg.inv(rays),
        "camera_cos": angle[:, : D // 4].cos(), "camera_sin": angle[:, : D // 4].sin(),
    }  # fmt: skip
    if problem.has_state:
        states = {name: (random(*o.shape), o.dtype) for name, o in state_operands(problem).items()}
        # The normaliser is a sum of keys, which are not negative; a denominator around zero would amplify every rounding.
        states["z"] = (states["z"][0].abs(), "float32")
        rounded |= {name: x for name, (x, kind) in states.items() if kind != "float32"}
        exact |= {name: x for name, (x, kind) in states.items() if kind == "float32"}
    return {name: x.to(dtype).contiguous() for name, x in rounded.items()} | {name: x.contiguous() for name, x in exact.items()}


def places_of(problem: Problem, operands: dict[str, torch.Tensor]) -> dict[str, Placed]:
    """Every input a tensor of its own, but the main branch's projections, which lie in one."""
    names, C = list(operands), problem.channels
    places = {name: Placed(i, 0, C) for i, name in enumerate(names) if name != "qkv"}
    places |= {name: Placed(names.index(name), 0, problem.heads) for name in ("beta", "decay")}
    size = operands["qkv"].element_size()
    return places | {f"main_{part}": Placed(names.index("qkv"), size * C * i, 3 * C) for i, part in enumerate("qkv")}


def main(has_state: bool, commit: bool, carry: bool) -> dict[str, float]:
    D, S = 16, 12
    problem = Problem(
        1, 2, D, 2, S, key_scale=(D * S) ** -0.5, kind="fp32", weight_kind="fp32", gate_kind="fp32", precision="ieee",
        has_state=has_state, commit=commit, camera_carry=carry,
    )  # fmt: skip
    operands = random_case(problem, torch.float32)
    described = [Operand("float32", tuple(t.shape)) for t in operands.values()]
    kept: list[Any] = []

    def compile_variants(variants: Any) -> tuple[Compiled, ...]:
        kept.extend(variants)
        return pretend(variants)

    made = gdn_launches(problem, "sm_80", described, places_of(problem, operands), compile_variants)
    launches = LaunchList.from_fields(*made.to_fields())
    found = dict(zip(output_operands(problem), run(launches, kept, list(operands.values())), strict=True))
    wanted = definition(problem, {n: t.double() for n, t in operands.items()})
    assert set(found) <= set(wanted)
    return {name: float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in found}


def definition(problem: Problem, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and new state by the plain definition."""
    gates = Gates(t["beta"], t["decay"], t["A_log"], t["dt_bias"])
    q, k, v = t["qkv"].split(problem.channels, -1)
    common: dict[str, Any] = {"chunks": (problem.frames,), "key_scale": problem.key_scale}
    past = (t["s"], t["z"], t["k_tail"]) if problem.has_state else None
    main = naive.main_gdn(q, k, v, gates, t["main_conv"], t["main_q_norm"], t["main_k_norm"], t["cos"], t["sin"], state=past, **common)
    cam_past: Any = (t["s_cam"], t.get("cam_tail")) if problem.has_state else None
    camera = naive.camera_gdn(
        t["camera_q"], t["camera_k"], t["camera_v"], gates, t["camera_conv"], t["camera_q_norm"], t["camera_k_norm"], t["rays"],
        t["rays_inverse"], t["camera_cos"], t["camera_sin"], carry=problem.camera_carry, state=cam_past, **common,
    )  # fmt: skip
    return dict(zip(("main_out", "s", "z", "k_tail", "camera_out", "s_cam", "cam_tail"), (*main, *camera), strict=True))


if __name__ == "__main__":
    print(json.dumps(main(*(word == "1" for word in sys.argv[1:4]))))

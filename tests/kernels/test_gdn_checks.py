"""What the fused gated delta network refuses, and what it declares: messages, scratch memory, launches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sanawm_kernels.aot.spec import ModelSizes, all_variants
from sanawm_kernels.gdn import fused
from sanawm_kernels.gdn.arguments import GDNState
from sanawm_kernels.gdn.plans import Problem, plan, row
from sanawm_kernels.gdn.samples import Sample, sample
from sanawm_kernels.gdn.table import TABLE
from sanawm_kernels.gdn.workspace import scratch
from sanawm_kernels.tuning import choose

B, H, D, T, S = 1, 2, 16, 2, 5
N, C = T * S, H * D
INPUTS = sample(B, H, D, T, S, dtype=torch.float32)
OFFICIAL = Problem(1, 20, 112, 3, 880, (112 * 880) ** -0.5)


def main(**fields: Any) -> Sample:
    return replace(INPUTS, main=replace(INPUTS.main, **fields))


def camera(**fields: Any) -> Sample:
    return replace(INPUTS, camera=replace(INPUTS.camera, **fields))


def gates(**fields: Any) -> Sample:
    return replace(INPUTS, gates=replace(INPUTS.gates, **fields))


def state(**fields: Any) -> GDNState:
    square, tail = torch.zeros(B, H, D, D), torch.zeros(B, 3, S, C)
    return replace(GDNState(square, torch.zeros(B, H, D), tail, square.clone(), tail.clone()), **fields)


REFUSED: list[tuple[Sample, dict[str, Any], str]] = [
    (replace(INPUTS, chunks=(1, 1)), {}, "one chunk of 1 to 5 frames"),
    (replace(INPUTS, chunks=(6,)), {}, "one chunk of 1 to 5 frames"),
    (replace(INPUTS, chunks=(3,)), {}, "N 10 with 3 frames"),
    (INPUTS, {"precision": "fp8"}, "expected a precision of bf16, tf32, ieee"),
    (main(q=INPUTS.main.q.half()), {}, "bfloat16 or float32"),
    (main(q=INPUTS.main.q.bfloat16()), {}, "interpreter computes bfloat16 wrongly"),
    (main(k=INPUTS.main.k.contiguous()), {}, "main k: expected torch.float32 of shape"),
    (main(v=INPUTS.main.v[:, :-1]), {}, "main v"),
    (main(conv=torch.zeros(C, 3)), {}, r"main conv: expected a contiguous torch.float32 tensor of shape \(32, 4\)"),
    (main(cos=INPUTS.main.cos.double()), {}, "main cos"),
    (main(q_norm=INPUTS.main.q_norm.half()), {}, "q_norm: expected bfloat16 or float32"),
    (camera(sin=INPUTS.main.sin), {}, "camera sin"),
    (camera(rays=INPUTS.camera.rays.expand(3, N, 4, 4)), {}, r"rays: expected shape \(1 or 1, 10, 4, 4\)"),
    (camera(rays_inverse=INPUTS.camera.rays_inverse.transpose(-1, -2)), {}, "rays_inverse: expected a contiguous"),
    (gates(beta_logits=INPUTS.gates.beta_logits.double()), {}, "beta_logits"),
    (gates(decay_logits=INPUTS.gates.decay_logits[:, :T]), {}, "decay_logits"),
    (gates(dt_bias=torch.zeros(H).double()), {}, "dt_bias"),
    (INPUTS, {"state": state(z=None)}, r"state.z: expected a tensor of shape \(1, 2, 16\), found None"),
    (INPUTS, {"state": state(s=torch.zeros(B, H, D, D).bfloat16())}, "state.s: expected a contiguous torch.float32"),
    (INPUTS, {"state_out": state(cam_tail=torch.zeros(B, 2, S, C))}, "state_out.cam_tail"),
    (INPUTS, {"main_out": torch.zeros(B, N, C + 1)}, "main_out: expected torch.float32 of shape"),
    (INPUTS, {"camera_out": torch.zeros(B, N, C + 2)[..., 1:-1]}, "camera_out: expected rows at multiples of 16 bytes"),
]


@pytest.mark.parametrize(("inputs", "options", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_refusals_say_what_was_expected(inputs: Sample, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fused.block_gdn(inputs.main, inputs.camera, inputs.gates, **inputs.options, **options)


def test_misaligned_projection_is_refused() -> None:
    shifted = [torch.zeros(B, N, C + 1)[..., 1:] for _ in range(3)]
    inputs = main(q=shifted[0], k=shifted[1], v=shifted[2])
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        fused.block_gdn(inputs.main, None, inputs.gates, **inputs.options)


def test_no_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="found neither"):
        fused.block_gdn(None, None, INPUTS.gates, **INPUTS.options)


def test_no_scratch_is_float32_of_token_size() -> None:
    buffers = scratch(1, 20, 3, 880, 112, "bf16", row(OFFICIAL, "summarize", 90).settings)
    wide = {name for name, (shape, dtype) in buffers.items() if dtype == "float32" and math.prod(shape) >= 3 * 880 * 2240}
    assert not wide


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 103, 120, 121])
def test_a_block_takes_four_launches_everywhere(target: int) -> None:
    launches = plan(OFFICIAL, target)
    assert [variant.name.split(".")[1] for variant in launches] == ["prepare", "summarize", "combine", "apply"]
    sizes = {"main_row": 15744}
    assert launches[0].launch_grid(sizes) == (880, 1, 3)
    assert all(math.prod(variant.launch_grid(sizes)) > 0 for variant in launches)
    # Every buffer a launch names is one that the others write, an input, or scratch.
    names = set().union(*(variant.signature for variant in launches))
    assert set(scratch(1, 20, 3, 880, 112, "bf16", row(OFFICIAL, "summarize", target).settings)) <= names


def test_hopper_has_kernels_of_its_own_for_wide_heads_in_half_precision() -> None:
    def own(problem: Problem, target: int) -> set[str]:
        return {variant.kernel.split(":")[1] for variant in plan(problem, target) if "_hopper:" in variant.kernel}

    assert own(OFFICIAL, 90) == {"combine", "apply"}
    for other in (replace(OFFICIAL, head_dim=32), replace(OFFICIAL, head_dim=120), replace(OFFICIAL, precision="tf32")):
        assert not own(other, 90)
    assert not any(own(OFFICIAL, target) for target in (80, 89, 100, 120))


def test_chunk_lengths_and_forms_have_variants() -> None:
    names = {variant.name for variant in all_variants(ModelSizes(frames=(3, 4)), 90) if variant.name.startswith("gdn.")}
    for frames in (3, 4):
        for form in ("read", "commit", "read_first", "commit_first"):
            assert f"gdn.prepare.block.{frames}f.bf16.bf16.{form}" in names
            assert f"gdn.combine.block.{frames}f.bf16.bf16.{form}.hopper" in names
        assert f"gdn.summarize.block.{frames}f.bf16.bf16" in names and f"gdn.apply.block.{frames}f.bf16.bf16.hopper" in names


def test_tuning_rows_are_dated_and_reasoned() -> None:
    assert all(len(row.date) == 10 and len(row.reason) > 10 for row in TABLE)
    with pytest.raises(ValueError, match=r"no tuning row for apply on compute capability 7\.5 with precision=bf16"):
        choose(TABLE, "apply", 75, precision="bf16")

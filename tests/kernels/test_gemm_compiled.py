"""What the compiler makes of the kernels, without a GPU: the right instructions, no spills, shared memory that fits.

Numbers cannot be checked here for FP8 and NVFP4 instructions; the interpreter's tests check the same kernels' arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sanawm_kernels.aot.compile import SHARED_LIMIT

# (package, variant, target, texts that its PTX must hold)
CASES: list[tuple[str, str, int, list[str]]] = [
    ("gemm", "gemm.n13440.k2240.nvfp4.bias_silu.bf16", 120, ["kind::mxf4nvf4.block_scale", "cp.async"]),
    ("gemm", "gemm.n2240.k2240.nvfp4.bias_add_gate.bf16.nvfp4", 120, ["kind::mxf4nvf4.block_scale", "cvt.rn.satfinite.e2m1x2.f32"]),
    ("gemm", "gemm.n2240.k6720.nvfp4_swizzled.plain.bf16", 100, ["tcgen05.mma", "kind::mxf4nvf4"]),
    (
        "gemm",
        "gemm.n2240.k2240.s880.fp8_x_fp8_rows.bias_frame_gate_residual_extra.bf16.pingpong",
        90,
        ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "cp.async.bulk.tensor"],
    ),
    (
        "gemm",
        "gemm.n2240.k2240.s880.bf16.bias_frame_gate_residual_extra.bf16.pingpong",
        90,
        ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "cp.async.bulk.tensor", "setmaxnreg"],
    ),
    (
        "gemm",
        "gemm.n2240.k6720.bf16.plain.bf16.wide",
        90,
        ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "cp.async.bulk.tensor", "setmaxnreg"],
    ),
    ("gdn", "gdn.apply.block.3f.bf16.bf16.hopper", 90, ["wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", "ld.global.v4", "st.global.v4"]),
    ("gdn", "gdn.combine.block.3f.bf16.bf16.commit.hopper", 90, ["wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32", "cp.async"]),
    ("gemm", "gemm.n15744.k2240.bf16.bias.bf16.tma", 90, ["wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "cp.async.bulk.tensor"]),
    (
        "gemm",
        "gemm.temporal.n2240.c2240.3x880.bf16.add_frame_gate_residual.bf16",
        89,
        ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16", "cp.async"],
    ),
    ("gemm", "gemm.temporal.n2240.c2240.3x880.fp8.add_frame_gate_residual.bf16", 120, ["e4m3.e4m3.f32", "cp.async"]),
    (
        "gemm",
        "gemm.n15680.k2240.fp8_rows.bias.bf16.tma",
        90,
        ["wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3", "cp.async.bulk.tensor"],
    ),
    (
        "conv",
        "conv.causal.8x176x320.c128.n128.residual.bf16.tma",
        90,
        ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "cp.async.bulk.tensor"],
    ),
    ("conv", "conv.causal.1x22x40.c1024.n1024.parts4.bf16.tma", 90, ["wgmma.mma_async", "cp.async.bulk.tensor"]),
    ("conv", "conv.causal.8x176x320.c128.n128.residual.bf16", 120, ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16", "cp.async"]),
    ("chunk", "chunk.modulation_rows.k5.bf16", 120, ["ld.global"]),
    (
        "attention",
        "attention.pair.h20.d112.s3.bf16",
        90,
        ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "cp.async.bulk.tensor.3d", "setmaxnreg"],
    ),
    ("attention", "attention.pair.h20.d112.s1.bf16", 90, ["wgmma.mma_async", "cp.async.bulk.tensor.3d"]),
    ("attention", "attention.pair_finish.h20.d112.s3.bf16", 90, ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16", "ld.global.v4"]),
    ("attention", "attention.pair_finish.h20.d112.s3.bf16.fp8", 90, ["cvt.rn.satfinite.e4m3x2.f32"]),
    ("attention", "attention.window.h20.d112.s3.bf16", 90, ["wgmma.mma_async", "cp.async"]),
    ("attention", "attention.window.h20.d112.s3.fp8", 120, ["e4m3.e4m3.f32", "cp.async"]),
    ("attention", "attention.cross.h20.d112.parts70.bf16", 120, ["mma.sync", "cp.async"]),
    ("tokenwise", "tokenwise.rows.c2240.s880.modulate.bf16.nvfp4", 120, ["cvt.rn.satfinite.e2m1x2.f32", "ld.global.v4"]),
    ("tokenwise", "tokenwise.depthwise_glu.22x40.g6720.bf16.fp8", 90, ["ld.global.b32", "cvt.rn.satfinite.e4m3x2.f32"]),
    ("tokenwise", "tokenwise.depthwise_glu.22x40.g6720.bf16.hopper", 90, ["cp.async.cg.shared.global", "ldmatrix.sync.aligned.m8n8.x4"]),
    (
        "tokenwise",
        "tokenwise.depthwise_glu.22x40.g6720.bf16.fp8.hopper",
        90,
        ["cp.async.cg.shared.global", "cvt.rn.bf16x2.f32", "cvt.rn.satfinite.e4m3x2.f32"],
    ),
    ("tokenwise", "tokenwise.ucpe_heads.h20.d112.n2640.bf16", 89, ["ld.global.v4"]),
]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    requests = [{"package": p, "name": n, "target": t, "find": texts} for p, n, t, texts in CASES]
    script = Path(__file__).with_name("compile_to_ptx.py")
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(requests), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {(r["name"], r["target"]): r for r in json.loads(done.stdout)}


@pytest.mark.parametrize(("name", "target"), [(n, t) for _, n, t, _ in CASES])
def test_instructions_spills_and_shared_memory(compiled: dict[tuple[str, int], dict[str, Any]], name: str, target: int) -> None:
    found = compiled[name, target]
    missing = [text for text, count in zip(found["find"], found["count"]) if count == 0]
    assert not missing
    assert found["spills"] == 0 or found["reason"]
    assert found["shared"] <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", [89, 90, 100, 120])
def test_variants_are_named_once_and_need_no_compiler(target: int) -> None:
    from sanawm_kernels.aot.spec import ModelSizes, all_variants

    names = {v.name for v in all_variants(ModelSizes(), target)}
    assert {name.split(".")[0] for name in names} >= {"gemm", "attention", "tokenwise"}
    assert any("nvfp4" in name for name in names) == (target >= 100)
    assert any("fp8" in name for name in names)


def test_importing_the_lists_needs_neither_torch_nor_triton() -> None:
    """The lists are read by the command line and by machines without either."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from sanawm_kernels.aot.spec import ModelSizes, all_variants\n"
        "print(len(all_variants(ModelSizes(), 90)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50

"""Launch settings of the gated delta network's kernels."""

from __future__ import annotations

from sanawm_kernels.tuning import Row

_WGMMA = (90,)
_OTHERS = (80, 86, 89, 100, 103, 120, 121)
_INTERPRETER = (0,)
_COMPILED = "2026-11-23"
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code, "

_EXACT = {"R": 16, "SPLITS": 1, "FUSED": False, "STORE_KEYS": False}

TABLE: tuple[Row, ...] = (
    Row("prepare", _WGMMA + _OTHERS, {}, 8, 1, _COMPILED, _INSPECTED + "122-128 registers, two programs a multiprocessor"),
    Row(
        "summarize", _WGMMA, {"R": 32, "SPLITS": 1, "FUSED": True, "STORE_KEYS": True}, 8, 2, _COMPILED,
        _INSPECTED + "255 registers, none spilled; 64 tokens a step spill", {"precision": "bf16"},
    ),
    Row(
        "summarize", _OTHERS, {"R": 32, "SPLITS": 1, "FUSED": False, "STORE_KEYS": True}, 8, 2, _COMPILED,
        _INSPECTED + "188 registers; fused jobs spill without wgmma", {"precision": "bf16"},
    ),
    Row("summarize", _WGMMA + _OTHERS, _EXACT, 8, 1, _COMPILED, "keys are convolved again so that none is rounded in memory"),
    Row("combine", _WGMMA + _OTHERS, {"ROWS": 16}, 8, 2, _COMPILED, _INSPECTED + "160 registers, 74 KiB, 300 programs at 20 heads"),
    Row("apply", _WGMMA + _OTHERS, {"R": 64}, 8, 1, _COMPILED, _INSPECTED + "150 registers; 128 tokens spill where there is no wgmma"),
    Row("prepare", _INTERPRETER, {}, 4, 1, _COMPILED, "the interpreter has no launch costs to tune"),
    Row("summarize", _INTERPRETER, {**_EXACT, "SPLITS": 2}, 4, 1, _COMPILED, "the exact form, with split sums", {"precision": "ieee"}),
    Row("summarize", _INTERPRETER, {"R": 32, "SPLITS": 1, "FUSED": True, "STORE_KEYS": True}, 4, 1, _COMPILED, "the form of bfloat16 on wgmma"),
    Row("combine", _INTERPRETER, {"ROWS": 16}, 4, 1, _COMPILED, "the interpreter has no launch costs to tune"),
    Row("apply", _INTERPRETER, {"R": 64}, 4, 1, _COMPILED, "the interpreter has no launch costs to tune"),
)  # fmt: skip

"""Launch settings of the gated delta network's kernels."""

from __future__ import annotations

from sanawm_kernels.tuning import Row

_GPUS = (80, 86, 89, 90, 100, 103, 120, 121)
_INTERPRETER = (0,)
_DATE = "2026-11-23"
_INSPECTED = "not timed; from the code compiled by Triton 3.6, 3.7 and 3.9 for sm_89, 90, 100 and 120: "
_INTERPRETED = "the interpreter has no launch costs to tune"
_EXACT = {"R": 16, "SPLITS": 1, "FUSED": False, "STORE_KEYS": False}
_HALF_KEYS = {"R": 32, "SPLITS": 1, "FUSED": False, "STORE_KEYS": True}

_HOPPER = (90,)
_TIMED = "2026-11-27"
_BF16 = {"precision": "bf16"}

TABLE: tuple[Row, ...] = (
    Row("summarize", _HOPPER, {**_HALF_KEYS, "R": 16, "FUSED": True}, 8, 3, _TIMED, "69.3 us on an H200, the median of 18 candidates 100.3", _BF16),
    Row("combine", _HOPPER, {"ROWS": 32}, 8, 1, _TIMED, "30.8 us on an H200, 16 rows 38.3", _BF16),
    Row("apply", _HOPPER, {"R": 32, "TILES": 7}, 8, 1, _TIMED, "54.8 us on an H200, the median of 22 candidates 64.4", _BF16),
    Row("prepare", _GPUS, {}, 8, 1, _DATE, _INSPECTED + "at most 128 registers for 3 frames but in Triton 3.6; 4 warps need twice that"),
    Row(
        "summarize", _GPUS, _HALF_KEYS, 8, 3, _DATE,
        _INSPECTED + "at most 200 registers but in Triton 3.6 for sm_89 (227); fused jobs take 255 on sm_90, and spill elsewhere and in Triton 3.9",
        {"precision": "bf16"},
    ),
    Row(
        "summarize", _GPUS, {**_EXACT, "STORE_KEYS": True}, 8, 1, _DATE,
        _INSPECTED + "149-151 registers; half-precision keys are as exact as tf32 operands", {"precision": "tf32"},
    ),
    Row("summarize", _GPUS, _EXACT, 8, 1, _DATE, "keys are convolved again, so that none is rounded in memory"),
    Row("combine", _GPUS, {"ROWS": 16}, 8, 2, _DATE, _INSPECTED + "160-176 registers, 74 KiB, 300 programs for 20 heads"),
    Row(
        "apply", _GPUS, {"R": 32, "TILES": 7}, 8, 2, _DATE,
        _INSPECTED + "128-144 registers, 66 KiB; one state serves a quarter of a frame, 480 programs for 20 heads and 3 frames",
    ),
    Row("prepare", _INTERPRETER, {}, 4, 1, _DATE, _INTERPRETED),
    Row("summarize", _INTERPRETER, {**_EXACT, "SPLITS": 2, "FUSED": True}, 4, 1, _DATE, "exact, split sums, fused jobs", {"precision": "ieee"}),
    Row("summarize", _INTERPRETER, _HALF_KEYS, 4, 1, _DATE, "the stored form"),
    Row("combine", _INTERPRETER, {"ROWS": 16}, 4, 1, _DATE, _INTERPRETED),
    Row("apply", _INTERPRETER, {"R": 16, "TILES": 2}, 4, 1, _DATE, _INTERPRETED),
)  # fmt: skip

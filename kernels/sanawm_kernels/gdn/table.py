"""Launch settings of the gated delta network's kernels."""

from __future__ import annotations

from sanawm_kernels.tuning import Row

_GPUS = (80, 86, 89, 90, 100, 103, 120, 121)
_INTERPRETER = (0,)
_DATE = "2026-11-23"
_INSPECTED = "not timed; from the code compiled by Triton 3.6, 3.7 and 3.9 for sm_89, 90, 100 and 120: "
_INTERPRETED = "the interpreter has no launch costs to tune"
_APART = {"R": 32, "SPLITS": 1, "FUSED": False}

_HOPPER = (90,)
_TIMED = "2026-11-27"
_BF16 = {"precision": "bf16"}
_HALVES = {"precision": "bf16", "halves": True}

TABLE: tuple[Row, ...] = (
    Row(
        "combine", _HOPPER, {"KERNEL": "combine_hopper", "ROWS": 64}, 8, 1, _TIMED,
        "17.6 us on an H200, 16 warps 21.9: 100 programs of 225 KiB, one round", {**_HALVES, "splits": 1},
    ),
    Row(
        "apply", _HOPPER, {"KERNEL": "apply_hopper", "R": 64, "TILES": 5, "REGISTERS": 168}, 4, 1, _TIMED,
        "30.5 us on an H200, other TILES 32.6 to 36.1: 360 programs, three a multiprocessor, one round", _HALVES,
    ),
    Row("combine", _HOPPER, {"ROWS": 32}, 8, 1, _TIMED, "30.8 us on an H200, 16 rows 38.3", _BF16),
    Row("apply", _HOPPER, {"R": 32, "TILES": 7}, 8, 1, _TIMED, "54.8 us on an H200, the median of 22 candidates 64.4", _BF16),
    Row("prepare", _GPUS, {}, 4, 1, _TIMED, "53.1 us on an H200, 8 warps 77.9; 128 registers for 3 frames on sm_90, none spilled"),
    Row("summarize", _HOPPER, {"R": 64, "SPLITS": 1, "FUSED": True}, 8, 3, _TIMED, "40.5 us on an H200, the median of 14 candidates 48.1", _BF16),
    Row("summarize", _GPUS, _APART, 8, 3, _TIMED, "not timed: 119 registers on sm_90, 160 on sm_120; fused jobs take 186 on sm_90", _BF16),
    Row("summarize", _GPUS, {**_APART, "R": 16}, 8, 1, _TIMED, "not timed: 122 to 144 registers"),
    Row("combine", _GPUS, {"ROWS": 16}, 8, 2, _DATE, _INSPECTED + "160-176 registers, 74 KiB, 300 programs for 20 heads"),
    Row(
        "apply", _GPUS, {"R": 32, "TILES": 7}, 8, 2, _DATE,
        _INSPECTED + "128-144 registers, 66 KiB; one state serves a quarter of a frame, 480 programs for 20 heads and 3 frames",
    ),
    Row("prepare", _INTERPRETER, {}, 4, 1, _DATE, _INTERPRETED),
    Row("summarize", _INTERPRETER, {"R": 16, "SPLITS": 2, "FUSED": True}, 4, 1, _DATE, "split sums, fused jobs", {"precision": "ieee"}),
    Row("summarize", _INTERPRETER, _APART, 4, 1, _DATE, "the jobs apart, whole frames"),
    Row("combine", _INTERPRETER, {"ROWS": 16}, 4, 1, _DATE, _INTERPRETED),
    Row("apply", _INTERPRETER, {"R": 16, "TILES": 2}, 4, 1, _DATE, _INTERPRETED),
)  # fmt: skip

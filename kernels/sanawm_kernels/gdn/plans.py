"""How the gated delta network's kernels are specialised: constants, signature, grid, warps.

Used by the host wrapper and by the ahead-of-time build alike; needs neither torch nor triton. Types are Triton's names ("bf16", "fp32").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.gdn.table import TABLE
from sanawm_kernels.tuning import Row, choose

NORM_EPS = 1e-5
DENOMINATOR_EPS = 1e-8
PRECISIONS = ("bf16", "tf32", "ieee")
MAX_FRAMES = 5


@dataclass(frozen=True)
class Problem:
    """One call's sizes, types and form.

    kind: dtype of projections, gate logits, tails and outputs; weight_kind: of norms and taps; gate_kind: of A_log and dt_bias.
    precision: how products round their operands. has_state: a chunk came before. commit: write the state this chunk leaves.
    main, camera: the branches computed. rays_shared: one set of ray matrices for the whole batch.
    """

    batch: int
    heads: int
    head_dim: int
    frames: int
    tokens: int
    key_scale: float
    kind: str = "bf16"
    weight_kind: str = "bf16"
    gate_kind: str = "bf16"
    precision: str = "bf16"
    has_state: bool = True
    commit: bool = True
    main: bool = True
    camera: bool = True
    clamp: bool = False
    camera_carry: bool = True

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def padded(self) -> int:
        """Head width padded to a power of two."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def branches(self) -> str:
        return "block" if self.main and self.camera else "main" if self.main else "camera"

    def name(self, phase: str, *facts: str) -> str:
        """Dotted variant name, `gdn.<phase>.<branches>.<frames>f.<type>...`, unique among the problems of one model's heads and grid.

        What the official model does not have is named: several batches, weights and gates of other dtypes, the RMS clamp, no camera tail.
        """
        unusual = {
            f"b{self.batch}": self.batch != 1, f"{self.weight_kind}_weight": self.weight_kind != self.kind,
            f"{self.gate_kind}_gates": self.gate_kind != self.kind, "clamp": self.clamp, "no_carry": not self.camera_carry,
        }  # fmt: skip
        return ".".join(("gdn", phase, self.branches, f"{self.frames}f", self.kind, *facts, *(fact for fact, holds in unusual.items() if holds)))


_trial: ContextVar[tuple[Row, ...]] = ContextVar("gdn_trial", default=())


@contextmanager
def trying(candidate: Row) -> Iterator[None]:
    """Plan with `candidate` before the table's rows, to tune it."""
    token = _trial.set((candidate,))
    try:
        yield
    finally:
        _trial.reset(token)


def row(problem: Problem, phase: str, target: int, **facts: Any) -> Row:
    """The phase's tuning row; `facts` are those that only some phases have.

    Of its settings KERNEL names a module other than the phase's own, and REGISTERS is the most that the compiler may use.
    """
    # Heads whose halves Hopper's own kernels take.
    halves = problem.head_dim % 16 == 0 and 64 < problem.head_dim <= 128
    return choose(_trial.get() + TABLE, phase, target, precision=problem.precision, kind=problem.kind, halves=halves, **facts)


def _split(entries: dict[str, str | None]) -> tuple[dict[str, str], dict[str, Any]]:
    """Signature of the operands that are present, and None constants for the absent ones."""
    return {name: kind for name, kind in entries.items() if kind is not None}, {name: None for name, kind in entries.items() if kind is None}


def _pointer(kind: str, *needed: bool) -> str | None:
    """A 16-byte aligned pointer, absent unless all of `needed` hold."""
    return f"*{kind}:16" if all(needed) else None


def _stride(kind: str, channels: int, needed: bool) -> str | None:
    """A distance in elements between rows or batches, which are 16-byte aligned when the channels are a multiple of 16."""
    return None if not needed else f"{kind}:16" if channels % 16 == 0 else kind


def _row_and_batch(p: Problem, branch: str, needed: bool) -> dict[str, str | None]:
    return {f"{branch}_row": _stride("i32", p.channels, needed), f"{branch}_batch": _stride("i64", p.channels, needed)}


def _applied(p: Problem) -> dict[str, str | None]:
    half = p.precision == "bf16"
    return {"applied": _pointer("fp16" if half else "fp32"), "applied_scale": _pointer("fp32", half)}


def _settings(tuned: Row, *names: str) -> dict[str, Any]:
    return {name: tuned.settings[name] for name in names}


def _sizes(p: Problem) -> dict[str, Any]:
    return {"B": p.batch, "H": p.heads, "T": p.frames, "S": p.tokens, "D": p.head_dim, "P": p.padded, "MAIN": p.main, "CAMERA": p.camera}


def _variant(
    p: Problem, phase: str, tuned: Row, facts: tuple[str, ...], entries: dict[str, str | None], constants: dict[str, Any], grid: tuple[str, str, str]
) -> KernelVariant:
    signature, absent = _split(entries)
    module = tuned.settings.get("KERNEL", phase)
    return KernelVariant(
        name=p.name(phase, *facts, *(["hopper"] if module != phase else [])), kernel=f"sanawm_kernels.gdn.{module}:{phase}", signature=signature,
        constexprs={**absent, **constants}, grid=grid, num_warps=tuned.num_warps, num_stages=tuned.num_stages, hot=True,
        options={"maxnreg": tuned.settings["REGISTERS"]} if "REGISTERS" in tuned.settings else {},
    )  # fmt: skip


def _form(p: Problem) -> str:
    return ("commit" if p.commit else "read") + ("" if p.has_state else "_first")


def _scratch_keys(p: Problem) -> dict[str, str | None]:
    """Keys and values that `prepare` hands to `summarize`."""
    stored = "fp16" if p.precision == "bf16" else "fp32"
    main, camera = _pointer(stored, p.main), _pointer(stored, p.camera)
    return {"main_keys": main, "plain_keys": main, "camera_keys": camera, "camera_values": camera, "growth": _pointer("fp32", p.camera)}


def _logits(p: Problem, name: str) -> dict[str, str | None]:
    """Logits (B, N, H) of the tokens' gates, columns of a merged projection."""
    return {name: f"*{p.kind}", f"{name}_row": "i32", f"{name}_batch": "i64"}


def prepare(p: Problem, target: int) -> KernelVariant:
    """Convolution, normalisation, rotations and tails: `sanawm_kernels.gdn.prepare`."""
    tuned = row(p, "prepare", target)
    first = 1 << (p.heads.bit_length() - 1)
    rest = p.heads - first
    second = 1 << (rest - 1).bit_length() if rest else 0
    entries: dict[str, str | None] = {}
    for branch, here in (("main", p.main), ("camera", p.camera)):
        entries |= {f"{branch}_{x}": _pointer(p.kind, here) for x in ("q", "k")}
        entries |= {f"{branch}_{x}": _pointer(p.weight_kind, here) for x in ("k_norm", "conv")}
        entries[f"{branch}_tail_in"] = _pointer(p.kind, here, p.has_state)
        entries[f"{branch}_tail_out"] = _pointer(p.kind, here, p.commit)
        entries |= _row_and_batch(p, branch, here)
    entries |= {x: _pointer("fp32", p.main) for x in ("cos", "sin")}
    entries |= {"camera_v": _pointer(p.kind, p.camera), "rays_batch": "i64" if p.camera else None}
    entries |= {x: _pointer("fp32", p.camera) for x in ("rays_inverse", "camera_cos", "camera_sin")}
    entries |= _logits(p, "beta") | _scratch_keys(p) | {"q_scale": _pointer("fp32")}
    constants = {
        **_sizes(p), "H0": first, "H1": second, "THREADS": 32 * tuned.num_warps, "EPS": NORM_EPS, "KEY_SCALE": p.key_scale,
        "CAMERA_CARRY": p.camera_carry, "HAS_STATE": p.has_state, "COMMIT": p.commit, "CLAMP": p.clamp,
    }  # fmt: skip
    return _variant(p, "prepare", tuned, (p.precision, _form(p)), entries, constants, ("S", "B", "MAIN + 2 * CAMERA"))


def summarize(p: Problem, target: int) -> KernelVariant:
    """Each frame's effect on the state: `sanawm_kernels.gdn.summarize`."""
    tuned = row(p, "summarize", target)
    entries: dict[str, str | None] = {"main_v": _pointer(p.kind, p.main), **_row_and_batch(p, "main", p.main)}
    entries |= _logits(p, "beta") | _logits(p, "decay") | _scratch_keys(p) | {"decay_sums": _pointer("fp32")}
    entries |= {"gram": _pointer("fp32"), "update": _pointer("fp32"), "column": _pointer("fp32", p.main), "inflation": _pointer("fp32", p.camera)}
    constants = {**_sizes(p), **_settings(tuned, "R", "SPLITS", "FUSED"), "KEY_SCALE": p.key_scale, "PRECISION": p.precision}
    return _variant(p, "summarize", tuned, (p.precision,), entries, constants, ("B * H", "T * SPLITS", "(MAIN + CAMERA) * (2 - FUSED) + MAIN"))


def combine(p: Problem, target: int) -> KernelVariant:
    """Frames' effects into states: `sanawm_kernels.gdn.combine`."""
    splits = row(p, "summarize", target).settings["SPLITS"]
    tuned = row(p, "combine", target, splits=splits)
    rows = tuned.settings["ROWS"]
    entries: dict[str, str | None] = {x: _pointer("fp32") for x in ("gram", "update")}
    entries |= {x: _pointer("fp32", p.main) for x in ("column", "applied_z")}
    entries |= {"inflation": _pointer("fp32", p.camera), **_applied(p)}
    for state, here in (("main_state", p.main), ("z", p.main), ("camera_state", p.camera)):
        entries |= {f"{state}_in": _pointer("fp32", here, p.has_state), f"{state}_out": _pointer("fp32", here, p.commit)}
    entries |= {"decay_sums": _pointer("fp32"), "A_log": f"*{p.gate_kind}", "dt_bias": f"*{p.gate_kind}"}
    # The frames' products are exact enough in tf32 for bf16 operands elsewhere.
    precision = "ieee" if p.precision == "ieee" else "tf32"
    constants = {
        **_sizes(p), "ROWS": rows, "BLOCKS": -(-p.head_dim // rows), "SPLITS": splits,
        "PRECISION": precision, "SCALED": p.precision == "bf16", "HAS_STATE": p.has_state, "COMMIT": p.commit,
    }  # fmt: skip
    variant = _variant(p, "combine", tuned, (p.precision, _form(p)), entries, constants, ("BLOCKS * (MAIN + CAMERA) + MAIN", "B * H", "1"))
    return replace(variant, spill_reason="on sm_90 up to 152 bytes for 3 frames, 624 for 4: rows of the state at all frames, once a launch")


def apply(p: Problem, target: int) -> KernelVariant:
    """States applied to queries: `sanawm_kernels.gdn.apply`."""
    tuned = row(p, "apply", target)
    entries: dict[str, str | None] = {}
    for branch, here in (("main", p.main), ("camera", p.camera)):
        entries |= {f"{branch}_q": _pointer(p.kind, here), f"{branch}_q_norm": _pointer(p.weight_kind, here), f"{branch}_out": _pointer(p.kind, here)}
        entries |= _row_and_batch(p, branch, here) | _row_and_batch(p, f"{branch}_out", here)
    entries |= {x: _pointer("fp32", p.main) for x in ("cos", "sin", "applied_z")}
    entries |= {x: _pointer("fp32", p.camera) for x in ("rays", "camera_cos", "camera_sin")}
    entries |= {"rays_batch": "i64" if p.camera else None, "q_scale": _pointer("fp32")}
    entries |= _applied(p)
    constants = {**_sizes(p), **_settings(tuned, "R", "TILES"), "EPS": DENOMINATOR_EPS, "PRECISION": p.precision, "CLAMP": p.clamp}
    variant = _variant(p, "apply", tuned, (p.precision,), entries, constants, ("cdiv(S, R * TILES)", "B * H * T", "MAIN + CAMERA"))
    return replace(variant, spill_reason="up to 40 bytes on sm_90, where 168 registers let three programs share a multiprocessor")


PHASES = (prepare, summarize, combine, apply)


def plan(problem: Problem, target: int) -> tuple[KernelVariant, ...]:
    """The launches of one call, in order."""
    return tuple(phase(problem, target) for phase in PHASES) if _trial.get() else _planned(problem, target)


@cache
def _planned(problem: Problem, target: int) -> tuple[KernelVariant, ...]:
    return tuple(phase(problem, target) for phase in PHASES)

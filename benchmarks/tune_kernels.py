"""Tuner of the recurrent, token-wise and cross-attention kernels: tries launch settings and proposes rows for the tables.

    python benchmarks/tune_kernels.py                               # on the device to tune for: each candidate's launch, timed and checked
    python benchmarks/tune_kernels.py --inspect sm_120 --only apply # without a device: registers, spills and shared memory of each candidate

All candidates are compiled first, in parallel, into Triton's cache. A candidate is timed as one CUDA graph of launches on several input sets, whose
traffic together exceeds the second-level cache, and its results are compared with the plain definition's.
"""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tune_inputs import DEVICE, EPS, GRID, PARTS, SINGLE, C, D, G, H, N, S, T

from sanawm_kernels.aot.cli import parse_targets
from sanawm_kernels.aot.compile import CompileError, compile_variant
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.attention import plans as attention_plans
from sanawm_kernels.attention.table import Tile
from sanawm_kernels.gdn import plans as gdn
from sanawm_kernels.tokenwise import block_plans, plans
from sanawm_kernels.tuning import Row

BLOCK = gdn.Problem(1, H, D, T, S, (D * S) ** -0.5, commit=False)

Choices = dict[str, Sequence[Any]]
MODULATIONS: list[Choices] = [
    {"R": (1,), "STAGES": (1,), "warps": (1, 2, 4, 8), "stages": (1,)},
    {"R": (2, 4, 8), "STAGES": (2, 3, 4), "warps": (2, 4, 8), "stages": (1,)},
]
# Settings of each phase, warps, stages: all combinations, unless a list of combinations is given.
CHOICES: dict[str, list[Choices]] = {
    "prepare": [{"warps": (4, 8, 16), "stages": (1,)}],
    "summarize": [
        {"R": (32, 64), "SPLITS": (1,), "FUSED": (False,), "warps": (8,), "stages": (2, 3, 4)},
        {"R": (32,), "SPLITS": (2, 3), "FUSED": (False,), "warps": (8,), "stages": (3, 4)},
        {"R": (32, 64), "SPLITS": (1, 2), "FUSED": (True,), "warps": (8,), "stages": (3,)},
    ],
    "combine": [{"ROWS": (16, 32), "warps": (8, 16), "stages": (1,)}],
    "apply": [
        {"R": (32,), "TILES": (1, 2, 4, 7), "warps": (4, 8), "stages": (1, 2)},
        {"R": (64,), "TILES": (1, 2, 4), "warps": (8,), "stages": (1, 2)},
    ],
    "cross": [
        {"queries": (64,), "keys": (32, 64), "warps": (4,), "stages": (2, 3, 4)},
        {"queries": (128,), "keys": (32, 64), "warps": (8,), "stages": (2, 3, 4)},
        {"queries": (128,), "keys": (128,), "warps": (8,), "stages": (2,)},
    ],
    "depthwise": [
        {"BX": (4, 5, 8, 10), "BC": (64,), "STRIP": (11, 22), "warps": (1,), "stages": (1,)},
        {"BX": (5, 8), "BC": (128,), "STRIP": (11, 22), "warps": (2,), "stages": (1,)},
        {"BX": (4, 8), "BC": (64,), "STRIP": (6, 8), "warps": (1,), "stages": (1,)},
    ],
    "rope": [{"warps": (1, 2, 4, 8), "stages": (1,)}],
    "ucpe": [{"warps": (1, 2, 4, 8), "stages": (1,)}],
    "inverse_ucpe": [{"warps": (1, 2, 4, 8), "stages": (1,)}],
    "transpose": [{"R": (32, 64, 128), "warps": (2, 4, 8), "stages": (1,)}],
    "modulate": MODULATIONS,
    "fp8_rows": MODULATIONS,
}
GDN = ("prepare", "summarize", "combine", "apply")


@dataclass(frozen=True)
class Candidate:
    """Settings to try for a phase."""

    phase: str
    settings: dict[str, Any] = field(hash=False)
    warps: int
    stages: int

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.phase:12s} {settings:44s} warps {self.warps:2d} stages {self.stages}"

    def row(self, target: int, reason: str = "") -> Row:
        """As a row of a tuning table."""
        facts = {"precision": BLOCK.precision} if self.phase in GDN else {}
        return Row(self.phase, (target,), self.settings, self.warps, self.stages, datetime.date.today().isoformat(), reason, facts)


def candidates(phases: Sequence[str]) -> Iterator[Candidate]:
    """Everything to try, phase by phase."""
    for phase in phases:
        for choices in CHOICES[phase]:
            names = [name for name in choices if name not in ("warps", "stages")]
            for *values, warps, stages in product(*(choices[name] for name in names), choices["warps"], choices["stages"]):
                yield Candidate(phase, dict(zip(names, values)), warps, stages)


def variant(c: Candidate, target: int) -> KernelVariant:
    """The kernel that a candidate launches."""
    if c.phase in GDN:
        with gdn.trying(c.row(target)):
            return next(v for v in gdn.plan(BLOCK, target) if f".{c.phase}." in v.name)
    if c.phase == "cross":
        tile = Tile(c.settings["queries"], c.settings["keys"], c.warps, c.stages)
        return attention_plans.cross_attention("bf16", "bf16", H, D, EPS, tile, parts=PARTS)
    kind = ("bf16", "bf16")
    base = {
        "depthwise": lambda: block_plans.depthwise_glu(*kind, *GRID, G),
        "rope": lambda: block_plans.rope_heads(*kind, H, D, N, EPS), "ucpe": lambda: block_plans.ucpe_heads(*kind, H, D, N, N, EPS, False),
        "inverse_ucpe": lambda: block_plans.inverse_ucpe("bf16", H, D, N, N), "transpose": lambda: block_plans.transpose_values("bf16", H, D),
        "modulate": lambda: plans.update_rows("bf16", C, S, modulate=True),
        "fp8_rows": lambda: plans.update_rows("bf16", C, S, modulate=True, keep=False, quant="fp8_rows"),
    }[c.phase]()  # fmt: skip
    if "LANES" in base.constexprs:
        base = replace(base, constexprs={**base.constexprs, "LANES": 32 * c.warps})
    return replace(base, constexprs={**base.constexprs, **c.settings}, num_warps=c.warps, num_stages=c.stages)


def inspect(c: Candidate, target: int) -> dict[str, Any] | None:
    """Index entry of the compiled candidate; None where it does not compile or fit."""
    try:
        return compile_variant(replace(variant(c, target), spill_reason="tuning"), target)[1]
    except CompileError as error:
        click.echo(f"{c}  {str(error).splitlines()[0][-90:]}")
        return None


@dataclass
class Launch:
    """One launch on one input set, and how far its result is from the plain definition's."""

    run: Callable[[], None]
    error: Callable[[], float]


class Inputs:
    """A phase's random inputs on the GPU, made when first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed, self.made = seed, dict[str, Any]()

    def of(self, name: str, make: Callable[[], Any]) -> Any:
        """The value under `name`."""
        if name not in self.made:
            import torch

            torch.manual_seed(self.seed)
            self.made[name] = make()
        return self.made[name]

    def launch(self, c: Candidate, target: int, compiling: bool = False) -> Launch:
        """A candidate on these inputs; `compiling` launches nothing else."""
        return self._gdn(c, target, compiling) if c.phase in GDN else self._single(c, target)

    def _gdn(self, c: Candidate, target: int, compiling: bool) -> Launch:
        import torch

        from sanawm_kernels.gdn import fused
        from sanawm_kernels.gdn.arguments import GDNState
        from sanawm_kernels.gdn.samples import reference, relative_error, sample
        from sanawm_kernels.tokenwise.launch import launch

        def first() -> Any:
            x = sample(1, H, D, T, S, dtype=torch.bfloat16, device=DEVICE, seed=self.seed)
            if compiling:
                square, tail = torch.zeros(1, H, D, D, device=DEVICE), torch.zeros(1, 3, S, C, dtype=torch.bfloat16, device=DEVICE)
                return x, GDNState(square, square[:, :, 0].contiguous(), tail, square, tail)
            return x, fused.block_gdn(x.main, x.camera, x.gates, **x.options).state

        x, state = self.of("gdn", first)
        with gdn.trying(c.row(target)):
            call = fused.bind(x.main, x.camera, x.gates, **x.options, state=state, commit=False)
        number = GDN.index(c.phase)
        kernel, arguments = call.launches[number]
        # What comes before has run once: a phase is timed on real operands.
        for before, given in () if compiling else call.launches[:number]:
            launch(before, given)

        def error() -> float:
            wanted = self.of("gdn.reference", lambda: reference(x, state)[:2])
            result = call.run()
            assert result.main is not None and result.camera is not None
            return max(relative_error(result.main, wanted[0]), relative_error(result.camera, wanted[1]))

        return Launch(lambda: launch(kernel, arguments), error)

    def _single(self, c: Candidate, target: int) -> Launch:
        from sanawm_kernels.tokenwise.launch import launch

        kernel = variant(c, target)
        arguments, sizes, wanted = self.of(f"{c.phase}", lambda: SINGLE[c.phase]())
        outputs = [name for name in arguments if name in wanted]

        def error() -> float:
            exact = self.of(f"{c.phase}.reference", lambda: {name: make() for name, make in wanted.items()})
            for name in outputs:
                if arguments[name].dtype.itemsize > 1:
                    arguments[name].fill_(float("nan"))
            launch(kernel, arguments, **sizes)
            worst = 0.0
            for name in outputs:
                found, exactly = arguments[name].double(), exact[name].double()
                gap = float((found.reshape(exactly.shape) - exactly).norm() / exactly.norm())
                worst = max(worst, gap if gap == gap else float("inf"))
            return worst

        return Launch(lambda: launch(kernel, arguments, **sizes), error)


# Relative L2 errors that a candidate may have: one rounding of operands or results to bfloat16, several in the recurrent block.
BOUNDS = dict.fromkeys(GDN, 3.8e-3) | {"cross": 6e-3, "transpose": 1e-3, "fp8_rows": 4e-3}
# Bytes that a launch must move, for the share of the copy bandwidth.
BYTES = {
    "prepare": 132.2e6, "summarize": 74.6e6, "combine": 20.2e6, "apply": 52.4e6, "cross": 27.1e6, "depthwise": 106.7e6,
    "rope": 48.5e6, "ucpe": 71.9e6, "inverse_ucpe": 24.1e6, "transpose": 17.7e6, "modulate": 23.7e6, "fp8_rows": 17.8e6,
}  # fmt: skip
_inputs: dict[int, Inputs] = {}


def warm(c: Candidate, target: int) -> str:
    """Compile a candidate by launching it once, in a process of its own; what went wrong, or nothing."""
    try:
        import torch

        _inputs.setdefault(0, Inputs(0)).launch(c, target, True).run()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return ""


def timed(launches: Sequence[Launch], replays: int) -> float:
    """Microseconds a launch: median over replays of one graph of all launches, each on its own inputs."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in launches:
            one.run()
    times = []
    for _ in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[3:])


def tune(phases: Sequence[str], workers: int, replays: int, sets: int) -> None:
    """Compile, time and rank."""
    import torch

    begun = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    target = major * 10 + minor
    jobs = list(candidates(phases))
    # Candidates of a phase go to a worker together, which makes that phase's inputs once.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        failures = list(pool.map(warm, jobs, [target] * len(jobs)))
    print(f"{len(jobs)} candidates compiled in {time.monotonic() - begun:.0f} s", flush=True)
    inputs = [Inputs(1 + i) for i in range(sets)]
    for phase in phases:
        found: list[tuple[float, float, Candidate]] = []
        for c, failure in zip(jobs, failures):
            if c.phase != phase:
                continue
            if failure:
                print(f"{c}  failed: {failure}", flush=True)
                continue
            try:
                launches = [one.launch(c, target) for one in inputs]
                error = launches[0].error()  # first: nothing may be loaded while a graph is recorded
                found.append((timed(launches * (2 if len(launches) < 8 else 1), replays), error, c))
            except Exception as problem:
                print(f"{c}  failed: {type(problem).__name__} {str(problem)[:90]}", flush=True)
        for one in inputs:
            one.made = {name: value for name, value in one.made.items() if name.startswith("gdn") and phase in GDN}
        torch.cuda.empty_cache()
        bound = BOUNDS.get(phase, 3e-3)
        found.sort(key=lambda entry: entry[0])
        print(f"-- {phase}: {len(found)} candidates, {time.monotonic() - begun:.0f} s", flush=True)
        for us, error, c in found[:10]:
            print(f"{c}  {us:7.1f} us  {BYTES[phase] / us * 1e-6:5.2f} TB/s  error {error:.1e}{'' if error <= bound else '  WRONG'}", flush=True)
        right = [entry for entry in found if entry[1] <= bound]
        if right:
            us, _, best = right[0]
            median = statistics.median(t for t, _, _ in found)
            reason = f"measured on {torch.cuda.get_device_name()}: {us:.1f} us, the median of {len(found)} candidates {median:.1f}"
            row = best.row(target, reason)
            print(f'Row("{phase}", ({target},), {dict(row.settings)}, {row.num_warps}, {row.num_stages}, "{row.date}", "{reason}", {dict(row.when)}),')
    print(f"done in {time.monotonic() - begun:.0f} s", flush=True)


@click.command()
@click.option("--only", "phases", multiple=True, type=click.Choice(list(CHOICES)), help="Phases to tune; may be repeated.")
@click.option("--inspect", "inspected", metavar="TARGET", help="Compile for this architecture and list what the code needs; times nothing.")
@click.option("--workers", default=min(14, max(1, (os.cpu_count() or 2) - 2)), show_default=True, help="Processes that compile.")
@click.option("--replays", default=12, show_default=True, help="Replays of each candidate's graph.")
@click.option("--sets", default=5, show_default=True, help="Input sets.")
def main(phases: tuple[str, ...], inspected: str | None, workers: int, replays: int, sets: int) -> None:
    chosen = phases or tuple(CHOICES)
    if inspected is not None:
        (target,) = parse_targets(inspected)
        for c in candidates(chosen):
            if entry := inspect(c, target):
                needs = f"registers {entry['registers']:3d} spills {entry['spill_bytes']:4d} shared {entry['shared_bytes']:6d}"
                click.echo(f"{c}  {needs}")
        return
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("no CUDA device was found; run this on the device to tune for, or use --inspect TARGET")
    tune(chosen, workers, replays, sets)


if __name__ == "__main__":
    main()

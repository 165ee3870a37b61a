"""Every program of a small CUDA bundle once or a few times: what compute-sanitizer watches.

    python benchmarks/engine_short.py build FOLDER
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/engine_short.py run FOLDER/bf16
    compute-sanitizer --tool racecheck --racecheck-report hazard --print-limit 1000000 --show-backtrace no --log-file LOG \\
        python benchmarks/engine_short.py run FOLDER/bf16
    python benchmarks/engine_short.py races LOG FOLDER/bf16

The model is small, but its two blocks are as wide as the official ones, so that no tile is held twice, and its kernels those that the official size
uses on Hopper. `run` imports neither torch nor Triton: a start (both encoders, the prompt's keys), then the first, the second and a steady chunk,
denoised, committed and decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sanawm.config import DiTConfig, WorldConfig, tiny_config

CHUNKS = 3


def small_world() -> WorldConfig:
    """A GDN block and a softmax block of the official width, 192 x 320 pixels."""
    dit = DiTConfig(in_channels=64, depth=2, softmax_every=2, caption_channels=64, text_tokens=64, height=6, width=10)
    vae = dataclasses.replace(
        tiny_config().vae, latent_channels=64, encoder_widths=(64, 128, 128, 128), decoder_widths=(64, 128, 256),
    )  # fmt: skip
    return dataclasses.replace(tiny_config(), name="short", dit=dit, vae=vae)


def build(folder: Path, target: str, precisions: list[str]) -> None:
    """A bundle with weights in a file for each precision."""
    import engine_bundle  # beside this file; needs torch and Triton

    written: dict[bytes, Path] = {}
    for precision in precisions:
        made = engine_bundle.build(folder / f"{precision}-seed", small_world(), target, precision, seed=1)
        bundle = engine_bundle.stored(made, folder / precision, written)
        print(f"{bundle.root}: {len(bundle.manifest.files)} files", flush=True)


def run(bundle: Path) -> None:
    """A short stream. Raises SystemExit where frames are all alike, which no right run gives."""
    from sanawm.camera import actions_to_poses
    from sanawm_runtime.world import World

    with World.open(bundle) as world:
        picture = np.random.default_rng(0).integers(0, 256, (*world.image_size, 3), np.uint8)
        stream = world.start(picture, "a red bridge over a river")
        path = np.asarray(actions_to_poses("w-60,dw-60"), np.float64)
        start = 0
        for _ in range(CHUNKS):
            poses = path[start : start + stream.poses_needed]
            start += len(poses)
            chunk = stream.step(poses)
            if chunk.frames.std() == 0 or not np.isfinite(chunk.latents).all():
                raise SystemExit(f"chunk {chunk.index} of {bundle} is not what a model makes")
            print(f"chunk {chunk.index}: {len(chunk.frames)} frames", flush=True)
        stream.close()
    if loaded := {"torch", "triton"} & set(sys.modules):
        raise SystemExit(f"a run imports {', '.join(sorted(loaded))}")


# What the driver keeps of a program's shared memory on Hopper, below the kernel's own.
RESERVED = 1024
# Bytes of instructions from one store of a hand-over to the next, at most; 48 were seen.
BETWEEN = 64
_PLACE = re.compile(r"hazard detected.* at __shared__ (0x[0-9a-f]+)")
_THREAD = re.compile(r"(Read|Write) Thread \((\d+),\d+,\d+\) at (\w+)\+(0x[0-9a-f]+)")


@dataclasses.dataclass
class Hazard:
    """A report of racecheck: the byte, the kernel, and the instruction that wrote; `roles`: the first four warps wrote what another one read."""

    place: int
    entry: str = ""
    wrote: int = -1
    by_first: bool = False
    by_other: bool = False

    @property
    def roles(self) -> bool:
        return self.by_first and self.by_other


def read_hazards(lines: Iterable[str]) -> list[Hazard]:
    """Reports in a log of racecheck (`--racecheck-report hazard`)."""
    found: list[Hazard] = []
    for line in lines:
        if place := _PLACE.search(line):
            found.append(Hazard(int(place[1], 16)))
        elif found and (access := _THREAD.search(line)):
            hazard, thread = found[-1], int(access[2])
            hazard.entry = access[3]
            if access[1] == "Write":
                hazard.wrote, hazard.by_first = int(access[4], 16), thread < 128
            else:
                hazard.by_other = thread >= 128
    return found


def handover(kernel: Mapping[str, Any]) -> range:
    """Where Triton's compiler tells each warp beyond the first four what to do: a byte a warp, the last of the kernel's shared memory.

    Only kernels whose warps have roles have more than eight.
    """
    end = RESERVED + kernel["shared_bytes"]
    return range(end - (kernel["num_warps"] - 4 if kernel["num_warps"] > 8 else 0), end)


def sorted_hazards(found: Iterable[Hazard], kernels: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """By kernel, reports on the compiler's hand-over from the first four warps to the others, and the rest. kernels: rows of an index.

    The hand-over is the bytes above and what the roles were given, stored one after the other; all of it is read behind a named barrier that
    racecheck does not see.
    """
    found = list(found)
    places: dict[str, set[int]] = defaultdict(set)
    for kernel in kernels:
        places[kernel["entry"]].update(handover(kernel))
    stores = sorted({(hazard.entry, hazard.wrote) for hazard in found if hazard.roles})
    handed = {(hazard.entry, hazard.wrote) for hazard in found if hazard.roles and hazard.place in places[hazard.entry]}
    for before, store in [*pairwise(stores), *pairwise(reversed(stores))]:
        if before in handed and store[0] == before[0] and abs(store[1] - before[1]) <= BETWEEN:
            handed.add(store)
    compilers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for hazard in found:
        (compilers if hazard.roles and (hazard.entry, hazard.wrote) in handed else others)[hazard.entry] += 1
    return compilers, others


def races(log: Path, bundle: Path) -> None:
    """Say what racecheck found. Raises SystemExit for hazards of the kernels' own, or a log that does not reach its summary."""
    index = json.loads((bundle / "kernels" / "index.json").read_text())
    lines = log.read_text(errors="replace").splitlines()
    compilers, others = sorted_hazards(read_hazards(lines), index["kernels"])
    ended = any("RACECHECK SUMMARY" in line for line in lines)
    print(f"reports on the compiler's hand-over: {dict(compilers)}; others: {dict(others)}", flush=True)
    if others or not ended:
        raise SystemExit("racecheck found hazards" if others else f"{log} ends before racecheck's summary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build")
    make.add_argument("folder", type=Path)
    make.add_argument("--target", default="h200")
    make.add_argument("--precision", action="append", default=[])
    commands.add_parser("run").add_argument("bundle", type=Path)
    check = commands.add_parser("races")
    check.add_argument("log", type=Path)
    check.add_argument("bundle", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.folder, options.target, options.precision or ["bf16", "fp8"])
    elif options.command == "races":
        races(options.log, options.bundle)
    else:
        run(options.bundle)


if __name__ == "__main__":
    main()

"""Ahead-of-time build: every variant for every target, in parallel, into a directory with one index a target."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sanawm_kernels.aot import compile as compiler
from sanawm_kernels.aot.spec import KernelVariant, ModelSizes, all_variants
from sanawm_kernels.gemm.plans import EMULATED_FP4
from sanawm_kernels.gemm.variants import emulated

SCHEMA = 1
INDEX = "index.json"
EMULATING_TRITON = (3, 9)


@dataclass(frozen=True)
class Built:
    """One finished variant, as reported while a build runs."""

    target: int
    entry: dict[str, Any]
    cached: bool
    total: int


def cache_directory() -> Path:
    """Where compiled variants are kept between builds, by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanawm" / "kernels"


def select(sizes: ModelSizes, target: int, only: Sequence[str] = (), emulate_nvfp4: bool = False) -> list[KernelVariant]:
    """Variants of a target; with `only`, those whose name matches one of its patterns (`gdn.*`). `emulate_nvfp4`: see `build`."""
    found = all_variants(sizes, target)
    if emulate_nvfp4 and target == EMULATED_FP4:
        found += emulated(sizes)
    return [variant for variant in found if not only or any(fnmatchcase(variant.name, pattern) for pattern in only)]


def build(
    targets: Sequence[int],
    out_dir: Path,
    sizes: ModelSizes | None = None,
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    only: Sequence[str] = (),
    ptx_version: int | None = None,
    emulate_nvfp4: bool = False,
    report: Callable[[Built], None] = lambda built: None,
) -> dict[int, list[dict[str, Any]]]:
    """Compile all variants for `targets` into `out_dir/sm_XX/<name>.cubin` with `out_dir/sm_XX/index.json`; returns the indices' entries.

    jobs: processes (default: the machine's cores). cache: content-addressed directory that keeps finished variants, also of an interrupted
    build. report: called as variants finish. An index appears only once all its files are in place. emulate_nvfp4: sm_90 gets the NVFP4
    products as well, to check their numbers on a GPU without units for them.
    Raises CompileError for the first variant that fails, ValueError when nothing matches or this Triton cannot emulate.
    """
    sizes = sizes or ModelSizes()
    if emulate_nvfp4:
        _check_emulation(targets)
    work = [(target, variant) for target in targets for variant in select(sizes, target, only, emulate_nvfp4)]
    if not work:
        raise ValueError(f"no kernel variant of {', '.join(f'sm_{t}' for t in targets)} matches {' or '.join(only) or 'anything'}")
    kept = None if cache is None else str(cache)
    entries: dict[int, list[dict[str, Any]]] = {target: [] for target in targets}
    # Spawned, not forked: a worker must not inherit kernels that were defined for the interpreter.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs or os.cpu_count() or 1, len(work)), multiprocessing.get_context("spawn"), initializer=compiler.start_worker
    )
    try:
        waiting = {pool.submit(compiler.in_worker, variant, target, ptx_version, kept): target for target, variant in work}
        for future in concurrent.futures.as_completed(waiting):
            cubin, entry, cached = future.result()
            target = waiting[future]
            entry["file"] = f"{entry['name']}.cubin"
            _write(out_dir / f"sm_{target}" / entry["file"], cubin)
            entries[target].append(entry)
            report(Built(target, entry, cached, len(work)))
    except BaseException:
        _stop(pool)
        raise
    pool.shutdown()
    for target, found in entries.items():
        found.sort(key=lambda entry: entry["name"])
        _write(out_dir / f"sm_{target}" / INDEX, _index(target, ptx_version, found))
    return entries


def _check_emulation(targets: Sequence[int]) -> None:
    found = version("triton")
    if EMULATED_FP4 not in targets:
        raise ValueError(f"NVFP4 products are emulated on sm_{EMULATED_FP4}, found no such target; leave --emulate-nvfp4 out")
    if tuple(map(int, found.split(".")[:2])) < EMULATING_TRITON:
        raise ValueError(f"NVFP4 products on sm_{EMULATED_FP4} need Triton {'.'.join(map(str, EMULATING_TRITON))} or later, found {found}")


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Give up at once: compilers that run are ended, what they finished is in the cache."""
    workers = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


def _index(target: int, ptx_version: int | None, entries: list[dict[str, Any]]) -> bytes:
    import triton

    head = {"schema": SCHEMA, "target": f"sm_{target}", "triton": triton.__version__, "ptx_version": ptx_version, "kernels": entries}
    return (json.dumps(head, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def read_index(directory: Path) -> dict[str, Any]:
    """Index of a target's directory; ValueError if it is of another schema."""
    index: dict[str, Any] = json.loads((directory / INDEX).read_text())
    if index.get("schema") != SCHEMA:
        raise ValueError(f"{directory / INDEX}: expected schema {SCHEMA}, found {index.get('schema')}; rebuild the kernels")
    return index

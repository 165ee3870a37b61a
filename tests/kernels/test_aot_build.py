"""Ahead-of-time build: cubins for four architectures, what their ELF says, the cache, interruption. Compiles in processes of its own."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sanawm_kernels.aot import compile as compiler
from sanawm_kernels.aot import elf
from sanawm_kernels.aot.build import Built, build, read_index, select
from sanawm_kernels.aot.cli import kernels_group
from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.gdn.plans import Problem, prepare

HOT = (
    "gdn.prepare.block.3f.bf16.bf16.read", "gdn.prepare.block.3f.bf16.bf16.commit", "gdn.summarize.*.3f.*", "gdn.combine.*.3f.*.commit",
    "gdn.combine.*.3f.*.commit.hopper", "gdn.apply.*.3f.*",
)  # fmt: skip
SOME = ("gdn.summarize.*.3f.*", "gdn.apply.*.3f.*")
QUICK = "gdn.prepare.block.3f.bf16.bf16.read_first"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels")
    build((90, 120), out, only=HOT, jobs=2, cache=out / "cache")
    build((89, 100), out, only=SOME, jobs=2, cache=out / "cache")
    return out


def in_process(function: Any, *arguments: Any) -> Any:
    """Call in a new process in which kernels compile."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=compiler.start_worker) as pool:
        return pool.submit(function, *arguments).result()


def quick() -> KernelVariant:
    return prepare(Problem(1, 20, 112, 3, 880, 1.0, has_state=False, commit=False), 90)


@pytest.mark.parametrize("target", [89, 90, 100, 120])
def test_index_says_what_the_files_are(built: Path, target: int) -> None:
    index = read_index(built / f"sm_{target}")
    assert index["target"] == f"sm_{target}"
    assert len(index["kernels"]) == (5 if target in (90, 120) else 2)
    for entry in index["kernels"]:
        cubin = (built / f"sm_{target}" / entry["file"]).read_bytes()
        assert hashlib.sha256(cubin).hexdigest() == entry["sha256"]
        code = elf.read(cubin)
        assert entry["arch"] == f"sm_{code.arch}" == f"sm_{target}"
        assert (entry["registers"], entry["spill_bytes"], entry["entry"]) == (code.registers, code.stack_bytes, code.entry)
        assert 0 < entry["registers"] <= 255 and entry["num_warps"] * 32 == code.threads
        # Every argument has its place: pointers and 64-bit integers take 8 bytes, 32-bit ones 4; the hidden pointers follow.
        sizes = [4 if argument["type"].startswith("i32") else 8 for argument in entry["arguments"]] + [8] * len(entry["hidden"])
        assert [size for _, size in entry["parameters"]] == sizes
        assert entry["hidden"] == ["global_scratch", "profile_scratch"]


@pytest.mark.parametrize("target", [90, 120])
def test_hot_kernels_do_not_spill(built: Path, target: int) -> None:
    kernels = read_index(built / f"sm_{target}")["kernels"]
    assert {entry["name"]: entry["spill_bytes"] for entry in kernels if entry["spill_bytes"] and not entry["spill_reason"]} == {}


@pytest.mark.parametrize("target", [89, 90, 100, 120])
def test_elf_agrees_with_the_toolkit(built: Path, target: int) -> None:
    import triton

    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    for path in (built / f"sm_{target}").glob("*.cubin"):
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
        assert match
        code = elf.read(path.read_bytes())
        assert (code.registers, code.stack_bytes, code.static_shared) == tuple(map(int, match.groups()))


def test_cache_gives_the_same_bytes_without_compiling(built: Path, tmp_path: Path) -> None:
    seen: list[Built] = []
    build((90,), tmp_path, only=HOT, jobs=1, cache=built / "cache", report=seen.append)
    assert len(seen) == 5 and all(each.cached and each.total == 5 for each in seen)
    for path in (built / "sm_90").iterdir():
        assert (tmp_path / "sm_90" / path.name).read_bytes() == path.read_bytes()


def test_damaged_cache_entry_is_compiled_again(tmp_path: Path) -> None:
    variant = quick()
    cubin, _, cached = in_process(compiler.in_worker, variant, 90, None, str(tmp_path))
    assert not cached
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes()[:-9])
    again, _, cached = in_process(compiler.in_worker, variant, 90, None, str(tmp_path))
    assert not cached and again == cubin


def test_two_builds_are_identical(tmp_path: Path) -> None:
    for name in ("a", "b/deeper"):
        build((90,), tmp_path / name, only=(QUICK,), cache=None)
    first, second = tmp_path / "a" / "sm_90", tmp_path / "b/deeper" / "sm_90"
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir()) == [f"{QUICK}.cubin", "index.json"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    # What would differ from machine to machine: the path of the source in line tables, the compiler's scratch directory.
    cubin = (first / f"{QUICK}.cubin").read_bytes()
    assert b".py" not in cubin and b"/tmp" not in cubin and b".debug_line" not in cubin


def test_spilling_hot_kernel_is_refused_unless_it_says_why() -> None:
    # The kernel wants more than twice 32 registers.
    tight = dataclasses.replace(quick(), options={"maxnreg": 32})
    with pytest.raises(compiler.CompileError, match=r"spills \d+ bytes a thread on sm_90"):
        in_process(compiler.compile_variant, tight, 90)
    _, entry = in_process(compiler.compile_variant, dataclasses.replace(tight, spill_reason="to try it"), 90)
    assert entry["spill_bytes"] > 0 and entry["spill_reason"] == "to try it"


def test_code_for_another_architecture_is_refused(built: Path) -> None:
    (entry,) = (e for e in read_index(built / "sm_90")["kernels"] if ".apply." in e["name"])
    with pytest.raises(compiler.CompileError, match="expected code for sm_120, the compiler made code for sm_90"):
        compiler._check(quick(), entry, 120)


def test_interpreted_process_cannot_compile() -> None:
    with pytest.raises(compiler.CompileError, match="unset TRITON_INTERPRET"):
        compiler.compile_variant(quick(), 90)


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(60), b"\x7fELF\x02" + bytes(13) + b"\xbe\x00" + bytes(80), os.urandom(500)])
def test_what_is_no_cubin_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cubin"):
        elf.read(data)


def test_truncated_cubin_is_refused(built: Path) -> None:
    cubin = next((built / "sm_89").glob("*.cubin")).read_bytes()
    for length in (64, 200, len(cubin) // 2):
        with pytest.raises(ValueError, match="cubin"):
            elf.read(cubin[:length])


def test_command_builds_and_shows(tmp_path: Path) -> None:
    command = ["build", "--target", "9.0", "-o", str(tmp_path), "--only", QUICK, "--ptx-version", "87", "--cache", str(tmp_path / "cache")]
    for line in ("1 kernels", "1 of 1 from the cache"):
        result = CliRunner().invoke(kernels_group, command)
        assert result.exit_code == 0, result.output
        assert line in result.output
    assert read_index(tmp_path / "sm_90")["ptx_version"] == 87
    shown = CliRunner().invoke(kernels_group, ["show", str(tmp_path / "sm_90"), "--json"])
    assert json.loads(shown.output)["kernels"][0]["name"] == QUICK
    assert QUICK in CliRunner().invoke(kernels_group, ["show", str(tmp_path / "sm_90")], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "expected architectures among sm_80"),
        (["--target", "sm_90,hopper"], "found 'hopper'"),
        (["--target", "sm_90", "--only", "nothing.*"], "no kernel variant of sm_90 matches nothing.*"),
        (["--target", "sm_120", "--emulate-nvfp4"], "emulated on sm_90, found no such target"),
    ],
)
def test_mistakes_at_the_command_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(kernels_group, ["build", "-o", str(tmp_path), *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_emulation_needs_a_compiler_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sanawm_kernels.aot.build.version", lambda name: "3.7.1")
    result = CliRunner().invoke(kernels_group, ["build", "-o", str(tmp_path), "--target", "sm_90", "--emulate-nvfp4"])
    assert result.exit_code == 2 and "need Triton 3.9 or later, found 3.7.1" in " ".join(result.output.split())


def test_emulated_products_are_listed_for_hopper_alone() -> None:
    sizes = ModelSizes()
    plain, more = ({v.name for v in select(sizes, 90, emulate_nvfp4=emulate)} for emulate in (False, True))
    assert plain < more and {name for name in more - plain if ".nvfp4." in name} == more - plain
    assert select(sizes, 120, emulate_nvfp4=True) == select(sizes, 120)


def test_show_wants_a_built_directory(tmp_path: Path) -> None:
    result = CliRunner().invoke(kernels_group, ["show", str(tmp_path)])
    assert result.exit_code == 2 and "written by `sanawm kernels build`" in " ".join(result.output.split())


def test_interrupted_build_leaves_no_index_and_keeps_what_it_finished(tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [sys.executable, "-c", "from sanawm_kernels.aot.cli import kernels_group; kernels_group()"]
    options = ["build", "--target", "sm_90", "-o", str(out), "--only", "gdn.*.4f.*", "--jobs", "1", "--cache", str(cache)]
    with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("sm_90/*.cubin")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert not (out / "sm_90" / "index.json").exists()
    finished = [path for path in cache.rglob("*") if path.is_file()]
    assert finished and all(len(path.name) == 64 for path in finished)
    # Nothing of the build goes on.
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_sizes_change_the_code(tmp_path: Path) -> None:
    entries = build((90,), tmp_path, ModelSizes(height=6, width=10, hidden=128, head_dim=32), only=(QUICK,), cache=None)
    assert entries[90][0]["constants"]["S"] == 60

"""`sanawm kernels`: build the Triton kernels for any architecture, without a GPU, and show what was built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sanawm_kernels.aot.build import Built, build, cache_directory, read_index
from sanawm_kernels.aot.compile import CompileError
from sanawm_kernels.aot.spec import PRESETS, TARGETS


def parse_targets(text: str) -> list[int]:
    """Compute capabilities of a list such as "sm_90,sm_120" or "9.0,12.0"; click.BadParameter names the first that is not served."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", word.strip().lower())
        number = int(match[1] or match[2] + match[3]) if match else 0
        if number not in TARGETS:
            known = ", ".join(f"sm_{target}" for target in TARGETS)
            raise click.BadParameter(f"expected architectures among {known}, found '{word.strip()}'", param_hint="--target")
        if number not in found:
            found.append(number)
    return found


@click.group("kernels", context_settings={"help_option_names": ["-h", "--help"]})
def kernels_group() -> None:
    """Build the Triton kernels ahead of time, for any architecture and without a GPU."""


@kernels_group.command("build")
@click.option("--target", "targets", required=True, help="Architectures, separated by commas: sm_90,sm_120.")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory for cubins and indices.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="full", show_default=True, help="Sizes of the model.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Build only variants whose name matches, for example 'gdn.*'. Repeatable.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at a time (default: one a core).")
@click.option("--ptx-version", type=click.IntRange(80, 99), help="Cap the PTX version for older drivers: 87 runs on CUDA 12.8 drivers.")
@click.option("--emulate-nvfp4", is_flag=True, help="Also NVFP4 products for sm_90, to check their numbers there; needs Triton 3.9.")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Directory that keeps compiled variants between builds.")
@click.option("--no-cache", is_flag=True, help="Compile everything anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the indices as JSON.")
def build_command(
    targets: str, output: Path, preset: str, only: tuple[str, ...], jobs: int | None, ptx_version: int | None, cache: Path | None,
    no_cache: bool, emulate_nvfp4: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compile every kernel variant the model needs to cubins, with an index a target."""
    console = Console(stderr=True)
    chosen = parse_targets(targets)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reused = 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("kernels", total=None)

        def report(done: Built) -> None:
            nonlocal reused
            reused += done.cached
            progress.update(task, total=done.total, advance=1, description=f"sm_{done.target} {done.entry['name']}")

        try:
            kept = None if no_cache else cache or cache_directory()
            entries = build(
                chosen, output, PRESETS[preset], jobs=jobs, cache=kept, only=only, ptx_version=ptx_version, emulate_nvfp4=emulate_nvfp4, report=report
            )  # fmt: skip
        except CompileError as error:
            raise click.ClickException(str(error)) from error
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps({f"sm_{target}": found for target, found in entries.items()}, indent=1))
        return
    for target, found in entries.items():
        spilling = [entry["name"] for entry in found if entry["spill_bytes"]]
        click.echo(f"{output / f'sm_{target}'}: {len(found)} kernels" + (f", {len(spilling)} with spills: {', '.join(spilling)}" if spilling else ""))
    if reused:
        click.echo(f"{reused} of {sum(map(len, entries.values()))} from the cache")


@kernels_group.command("show")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the index as JSON.")
def show_command(directory: Path, as_json: bool) -> None:
    """Table of the kernels in a target's directory."""
    try:
        index = read_index(directory)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{directory}: expected a directory written by `sanawm kernels build`, for example OUT/sm_90 ({error})") from error
    if as_json:
        click.echo(json.dumps(index, indent=1))
    else:
        Console().print(_table(index))


def _table(index: dict[str, Any]) -> Table:
    table = Table(title=f"{index['target']}, Triton {index['triton']}")
    for heading in ("kernel", "warps", "registers", "spills", "shared", "grid"):
        table.add_column(heading, justify="left" if heading in ("kernel", "grid") else "right")
    for entry in index["kernels"]:
        numbers = (entry["num_warps"], entry["registers"], entry["spill_bytes"], entry["shared_bytes"])
        table.add_row(entry["name"], *map(str, numbers), " x ".join(entry["grid"]))
    return table

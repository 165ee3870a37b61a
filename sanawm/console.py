"""What commands share on the terminal: progress bars on stderr, JSON on stdout."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Results go to stdout, everything a person merely watches to stderr, so that output can be piped.
stderr = Console(stderr=True)
stdout = Console()


def progress() -> Progress:
    """A progress display with a count and elapsed time; silent where stderr is not a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

"""Tables of README and docs from the measured rows in `benchmarks/results`.

    python benchmarks/tables.py            # rewrite what stands between the markers
    python benchmarks/tables.py --check    # exit 1 where a table is not what the rows say

A table stands between `<!-- results FILE.json CASE... -->` and `<!-- /results -->`; CASE may hold *.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- results (?P<file>\S+\.json) (?P<cases>[^>]+?) -->\n)(?P<table>.*?)(<!-- /results -->)", re.DOTALL)
_COLUMNS = ("case", "metric", "value", "least to most", "n", "floor", "peer")


def number(value: float | None, unit: str = "") -> str:
    """Four significant digits with a unit; "1" is the unit of counts and ratios."""
    if value is None:
        return ""
    text = (f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}") if value == int(value) else f"{value:.4g}"
    return text if unit in ("", "1") else f"{text} {unit}"


def render(result: Mapping[str, Any], cases: Sequence[str]) -> str:
    """A Markdown table of the rows whose case matches one of the patterns, under a line that says where they were measured.

    Raises ValueError where nothing matches.
    """
    rows = [row for row in result["rows"] if any(fnmatch.fnmatchcase(row["case"], pattern) for pattern in cases)]
    if not rows:
        raise ValueError(f"no case matches {' '.join(cases)}; the file has {', '.join(sorted({row['case'] for row in result['rows']}))}")
    lines = [_where(result), "", f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)]) + "\n"


def _where(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    notes = f" {result['notes'][:1].upper()}{result['notes'][1:]}." if result.get("notes") else ""
    return f"{result['hardware']}{driver}; {versions}; commit {result['commit']}, {result['date']}.{notes}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    unit, row = "ms" if _short(row) else row["unit"], _readable(row)
    spread = "" if row.get("min") is None or row["n"] == 1 else f"{number(row['min'])} to {number(row['max'])}"
    peer = "" if row.get("peer") is None else f"{row['peer']}: {number(row['peer_value'], unit)}"
    return [f"`{row['case']}`", row["metric"], number(row["value"], unit), spread, number(row["n"]), number(row.get("floor"), unit), peer]


def _short(row: Mapping[str, Any]) -> bool:
    """Whether a time in seconds is less than one."""
    return bool(row["unit"] == "s" and row["value"] < 1)


def _readable(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a short time's numbers in milliseconds."""
    if not _short(row):
        return row
    return {**row, **{key: 1e3 * row[key] for key in ("value", "min", "max", "floor", "peer_value") if row.get(key) is not None}}


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with every table as the rows say."""

    def table(found: re.Match[str]) -> str:
        result = json.loads((results / found["file"]).read_text())
        return f"{found[1]}{render(result, found['cases'].split())}{found[5]}"

    return _BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of README and docs from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is not what the rows say")
    check = parser.parse_args().check
    stale = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from the rows' if check else 'rewritten'}")
        if not check:
            page.write_text(filled(page.read_text()))
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()

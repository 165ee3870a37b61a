"""Tables in the docs are what the measured rows say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tables

ROOT = Path(__file__).parents[2]
ROW = {"case": "gdn.block.3f.bf16", "metric": "time", "value": 251.25, "unit": "us", "min": 249.0, "max": 262.5, "n": 50}
RESULT: dict[str, Any] = {
    "hardware": "a GPU", "driver": "580.1", "versions": {"torch": "2.11.0"}, "commit": "abc1234", "date": "2026-11-23", "notes": "fresh inputs",
    "rows": [
        {**ROW, "floor": 49.5, "peer": "sglang", "peer_value": 1003.0},
        {**ROW, "case": "block.gdn.bf16", "value": 12000, "floor": None, "peer": None, "peer_value": None},
    ],
}  # fmt: skip


def test_a_row_with_its_floor_and_peer() -> None:
    first, _, *table = tables.render(RESULT, ["gdn.*"]).splitlines()
    assert first == "a GPU, driver 580.1; torch 2.11.0; commit abc1234, 2026-11-23. Fresh inputs."
    assert table[2:] == ["| `gdn.block.3f.bf16` | time | 251.2 us | 249 to 262.5 | 50 | 49.5 us | sglang: 1003 us |"]


def test_several_patterns_keep_the_files_order() -> None:
    lines = tables.render(RESULT, ["block.*", "gdn.*"]).splitlines()[4:]
    assert [line.split("`")[1] for line in lines] == ["gdn.block.3f.bf16", "block.gdn.bf16"]
    assert "| 12,000 us |" in lines[1]


def test_short_times_are_in_milliseconds_and_one_value_has_no_spread() -> None:
    row = {**ROW, "case": "engine.chunk", "unit": "s", "value": 0.1302, "min": 0.1291, "max": 0.1316, "floor": 0.058, "peer": "sglang", "peer_value": 0.455}
    rows = [row, {**row, "value": 1.5, "n": 1, "peer": None}]
    *_, short, long = tables.render({**RESULT, "rows": rows}, ["engine.*"]).splitlines()
    assert short == "| `engine.chunk` | time | 130.2 ms | 129.1 to 131.6 | 50 | 58 ms | sglang: 455 ms |"
    assert long == "| `engine.chunk` | time | 1.5 s |  | 1 | 0.058 s |  |"


def test_a_pattern_that_finds_nothing() -> None:
    with pytest.raises(ValueError, match=r"no case matches engine\.\*; the file has block\.gdn\.bf16, gdn\.block\.3f\.bf16"):
        tables.render(RESULT, ["engine.*"])


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "h200.json").write_text(json.dumps(RESULT))
    page = "before\n<!-- results h200.json gdn.* -->\nold\n<!-- /results -->\nafter\n"
    found = tables.filled(page, tmp_path)
    assert found.startswith("before\n<!-- results h200.json gdn.* -->\na GPU") and found.endswith("|\n<!-- /results -->\nafter\n") and "old" not in found
    assert tables.filled(found, tmp_path) == found


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_pages_are_up_to_date(page: Path) -> None:
    """After new measurements run `python benchmarks/tables.py`."""
    assert tables.filled(page.read_text()) == page.read_text()

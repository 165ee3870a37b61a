"""One result file from several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from merge_results import merge

from sanawm_export.peers import sglang_clip


def result(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    head = {"hardware": "a GPU", "driver": None, "versions": {}, "commit": "abc", "date": "2026-11-27", "notes": "random weights"}
    return {**head, "rows": list(rows), **more}


def row(case: str, value: float) -> dict[str, Any]:
    return {"case": case, "value": value, "peer": None, "peer_value": None}


def test_a_case_gets_the_fastest_of_its_peers() -> None:
    peers = [entry for variant, seconds in (("sglang", [0.7, 0.8, 0.6]), ("sglang-compiled", [0.5])) for entry in sglang_clip.rows(variant, seconds, 961, 40)]
    engine = result(row("engine.denoise.961f.bf16", 6.5), row("engine.chunk.bf16", 0.1), driver="13010", spans=[1])
    merged = merge({"bf16": engine, "peers": result(*peers)})
    found = {entry["case"]: entry for entry in merged["rows"]}
    assert (found["engine.denoise.961f.bf16"]["peer"], found["engine.denoise.961f.bf16"]["peer_value"]) == ("sglang-compiled", 20.0)
    assert found["peer.sglang.denoise.961f.bf16"]["value"] == pytest.approx(28.0) and found["peer.sglang.chunk.bf16"]["n"] == 3
    assert found["engine.chunk.bf16"]["peer"] is None and not any("peer_of" in entry for entry in merged["rows"])
    assert merged["driver"] == "13010" and merged["details"] == {"bf16": {"spans": [1]}} and merged["notes"] == "random weights"


def test_only_one_run_on_one_machine_is_merged() -> None:
    with pytest.raises(ValueError, match="expected results of one hardware"):
        merge({"a": result(), "b": result(hardware="another")})
    with pytest.raises(ValueError, match=r"measured twice: engine\.chunk"):
        merge({"a": result(row("engine.chunk", 1)), "b": result(row("engine.chunk", 2))})

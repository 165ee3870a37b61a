"""What `sanawm bench --peer` runs beside the engine, with a stand-in for the peer: the real ones need a GPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sanawm.errors import UserError
from sanawm_export import peers
from sanawm_export.peers import sglang_clip

SCRIPT = """
import json, pathlib, sys
folder, _, frames, _, out = sys.argv[1:]
if frames == "9":
    print("a warning", file=sys.stderr)
    sys.exit("out of memory")
pathlib.Path(out).write_text(json.dumps({"rows": [{"case": folder, "frames": frames}]}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right version, timed by SCRIPT; its folder."""
    (tmp_path / "a_peers_clip.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(peers.PEERS, "sglang", dataclasses.replace(peers.PEERS["sglang"], module="a_peers_clip"))
    found = SimpleNamespace(version=peers.PEERS["sglang"].version, locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    return tmp_path


def test_a_peer_is_run_from_where_it_is_installed(stand_in: Path) -> None:
    assert peers.run("sglang", 17)["rows"] == [{"case": str(stand_in), "frames": "17"}]


def test_a_peer_that_fails_says_why(stand_in: Path) -> None:
    with pytest.raises(UserError, match="the peer sglang ended with exit code 1: out of memory$"):
        peers.run("sglang", 9)


@pytest.mark.parametrize(("version", "message"), [(None, "which is not installed: pip install --no-deps sglang=="), ("0.1", r"written for sglang .*, found 0\.1")])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None, message: str) -> None:
    def distribution(name: str) -> Any:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=version)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(UserError, match=message):
        peers.folder("sglang")


class Chunks:
    """Stands in for sglang's chunk loop."""

    def __init__(self, last: float) -> None:
        self.calls: list[Any] = []
        self.latents = torch.tensor([last])

    def chunk(self, index: int) -> None:
        self.calls.append(index)

    def compile(self, wrap: Any) -> None:
        self.calls.append("compile")


def test_steady_chunks_alone_are_compiled_and_timed() -> None:
    chunks: Any = Chunks(1.0)
    seconds = sglang_clip.measure(chunks, 2, "cpu", True)
    assert chunks.calls == [0, 1, "compile", 2, 3, 4] and len(seconds) == 2 and min(seconds) > 0
    eager: Any = Chunks(float("nan"))
    with pytest.raises(SystemExit, match="not finite"):
        sglang_clip.measure(eager, 1, "cpu", False)
    assert "compile" not in eager.calls


def test_a_case_gets_the_fastest_of_its_peers() -> None:
    rows = [{"case": "engine.denoise.961f.bf16", "peer": None, "peer_value": None}]
    rows += [row for variant, seconds in (("sglang", [0.7]), ("sglang-compiled", [0.5])) for row in sglang_clip.rows(variant, seconds, 961, 40)]
    peers.attach(rows)
    assert (rows[0]["peer"], rows[0]["peer_value"]) == ("sglang-compiled", 20.0)
    assert not any("peer_of" in row for row in rows) and json.dumps(rows) and "sglang" not in sys.modules

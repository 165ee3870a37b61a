"""The example of the documentation, run as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import toy

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "runtime/README.md", "docs/runtime.md")


def example(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```\n<!-- /example -->", text, re.DOTALL)
    return code


def test_every_page_shows_the_same_example():
    assert len({example(page) for page in PAGES}) == 1
    lines = [line for line in example(PAGES[0]).splitlines() if line.strip()]
    assert len(lines) < 25


@pytest.mark.parametrize("real", [False, True])
def test_the_example_runs(real, request, tmp_path, monkeypatch):
    bundle = request.getfixturevalue("tiny_bundle" if real else "toy_bundle")
    if not real:
        request.getfixturevalue("toy_engine")
    shutil.copytree(bundle, tmp_path / "world")
    (tmp_path / "first.png").write_bytes(toy.png(320, 192))
    monkeypatch.chdir(tmp_path)
    shown, asked = [], []

    def window_closed():
        asked.append(True)
        return len(asked) == 3

    names = {"show": shown.append, "keys_that_are_down": lambda: "wd", "window_closed": window_closed}
    exec(compile(example(PAGES[0]), "example", "exec"), names)
    assert [len(frames) for frames in shown] == [25, 24, 24, 24, 24, 25, 24, 24]
    assert all(frames.dtype == "uint8" for frames in shown)

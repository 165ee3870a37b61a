"""The runtime where nothing but its own few libraries is installed, in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HEAVY = ("torch", "triton", "onnx", "onnxscript", "transformers", "diffusers", "modelopt", "huggingface_hub", "yaml", "ml_dtypes")
OURS = ("sanawm.model", "sanawm_export", "sanawm_kernels", "sanawm_calibration")

BLOCKER = f"""
import json, sys, time
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == heavy or name.startswith(heavy + ".") for heavy in {HEAVY + OURS!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Absent())
"""


def run(program: str, *arguments: str | Path, cache: Path | None = None) -> dict[str, Any]:
    """What a program prints as JSON, run where HEAVY and OURS cannot be imported. `cache` keeps compiled modules, as an installation does."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    if cache:
        environment["PYTHONPYCACHEPREFIX"] = str(cache)
    command = [sys.executable, "-c", BLOCKER + program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", HEAVY + OURS)
def test_the_blocker_blocks(name: str) -> None:
    tried = run(f"""
try:
    import {name}
    print(json.dumps({{"error": ""}}))
except ModuleNotFoundError as error:
    print(json.dumps({{"error": str(error)}}))
""")
    assert tried["error"] == f"No module named '{name}'"


@pytest.mark.parametrize("what", ["import sanawm_runtime", "from sanawm_runtime import World"])
def test_import_time(what: str, tmp_path: Path) -> None:
    program = f"""
begin = time.process_time()
{what}
print(json.dumps({{"seconds": time.process_time() - begin, "modules": [m for m in sys.modules]}}))
"""
    runs = [run(program, cache=tmp_path) for _ in range(3)]
    # Processor time, which other programs on the machine do not lengthen; the first run also compiles.
    assert min(r["seconds"] for r in runs) < 0.5
    assert "sanawm_runtime" in runs[0]["modules"] and not {"onnxruntime", "av", "PIL.ImageDraw"} & set(runs[0]["modules"])


def test_every_module_imports() -> None:
    """No module of the runtime needs, at import, what the base installation does not have."""
    found = run("""
import importlib, pkgutil
import sanawm_runtime
names = [m.name for m in pkgutil.walk_packages(sanawm_runtime.__path__, "sanawm_runtime.")]
optional = ("sanawm_runtime.serve",)
failed = {}
for name in names:
    if not name.startswith(optional):
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed[name] = str(error)
print(json.dumps({"names": names, "failed": failed}))
""")
    assert {"sanawm_runtime.world", "sanawm_runtime.stream", "sanawm_runtime.engines.onnxruntime", "sanawm_runtime.video"} <= set(found["names"])
    assert not found["failed"]


def test_a_bundle_opens_and_runs(tiny_bundle: Path, tiny_world: Any) -> None:
    found = run(
        """
import hashlib
import numpy as np
from sanawm_runtime import World

with World.open(sys.argv[1]) as world:
    stream = world.start(np.full((192, 320, 3), 90, np.uint8), "a field", seed=3)
    chunks = [stream.step(np.tile(np.eye(4), (n, 1, 1))) for n in (25, 24)]
    loaded = sorted({m.partition(".")[0] for m in sys.modules})
    frames = np.concatenate([c.frames for c in chunks])
print(json.dumps({"shape": frames.shape, "sha256": hashlib.sha256(frames.tobytes()).hexdigest(), "loaded": loaded}))
""",
        tiny_bundle,
    )
    assert found["shape"] == [49, 192, 320, 3]
    assert not set(found["loaded"]) & set(HEAVY)
    # Another process, where torch is loaded, makes the same bytes.
    stream = tiny_world.start(np.full((192, 320, 3), 90, np.uint8), "a field", seed=3)
    frames = np.concatenate([stream.step(np.tile(np.eye(4), (n, 1, 1))).frames for n in (25, 24)])
    assert hashlib.sha256(frames.tobytes()).hexdigest() == found["sha256"]

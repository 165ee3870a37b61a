"""The command line as a user meets it: results, exit codes, and one sentence for each mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parent / "golden" / "dit_tiny.safetensors"


def sanawm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a shell would."""
    command = [sys.executable, "-m", "sanawm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The mistake is the user's: exit 2, one sentence on stderr that has these words, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sanawm: "), result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (90, 160, 3), np.uint8)).save(tmp_path / "first.png")
    return tmp_path / "first.png"


@pytest.fixture
def run(tiny_bundle: Path, picture: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`sanawm run` with good defaults that a test replaces or (None) drops."""

    def call(bundle: Path = tiny_bundle, **options: object) -> subprocess.CompletedProcess[str]:
        given = {"image": picture, "prompt": "a plain", "action": "w-24", "output": tmp_path / "clip.mp4"} | options
        flags = [str(x) for name, value in given.items() if value is not None for x in (f"--{name}", value)]
        return sanawm("run", bundle, *flags)

    return call


def test_help_and_version_import_nothing_heavy() -> None:
    result = sanawm("--help")
    assert result.returncode == 0
    assert "build-engine" in result.stdout and "parity" in result.stdout
    probe = "import sys, sanawm.cli; print([m for m in ('torch', 'numpy', 'onnx', 'sanawm_runtime') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


def test_full_preset_as_json() -> None:
    data = json.loads(sanawm("checkpoint", "synth", "--preset", "full", "--json").stdout)
    assert data["parameters"] == 2_661_800_448
    assert len(data["tensors"]) == 850
    assert data["tensors"]["blocks.0.attn.qkv.weight"] == [6720, 2240]


def test_parity_passes_and_fails_by_tolerance() -> None:
    good = sanawm("parity", GOLDEN, "--tol", "5e-6", "--json")
    report = json.loads(good.stdout)
    # fp32 against fp32 of two other implementations: a few units in the last place of values up to 4.
    assert good.returncode == 0 and report["passed"] and 0 < report["worst"] < 5e-6
    assert {t["tensor"].split(".")[0] for t in report["tensors"]} == {"dense", "stream", "official"}
    strict = sanawm("parity", GOLDEN, "--tol", "1e-9")
    assert strict.returncode == 1 and "FAILED" in strict.stdout


def test_run_writes_a_clip_and_its_timing(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    from sanawm_runtime.video import probe_video

    result = run(action="w-48", pictures=None)
    assert result.returncode == 0, result.stderr
    assert probe_video(tmp_path / "clip.mp4") | {"duration": 0} == {"frames": 49, "width": 320, "height": 192, "fps": 16.0, "duration": 0}
    timing = json.loads((tmp_path / "clip.timing.json").read_text())
    assert [c["frames"] for c in timing["chunks"]] == [25, 24]
    assert all(set(c["stages"]) == {"camera", "denoise", "commit", "decode", "write"} for c in timing["chunks"])


def test_inspect_and_verify_as_json(tiny_bundle: Path) -> None:
    summary = json.loads(sanawm("inspect", tiny_bundle, "--json").stdout)
    assert summary["target"] == {"name": "cpu", "engine": "onnxruntime", "capability": None}
    assert len(summary["programs"]) == 13
    checked = sanawm("verify", tiny_bundle, "--json")
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"]


def _poses(count: int = 25) -> np.ndarray:
    return np.tile(np.eye(4), (count, 1, 1))


@pytest.mark.parametrize(
    ("poses", "words"),
    [
        (np.zeros((25, 4, 3)), ("(F, 4, 4)",)),
        (_poses() * np.array([2.0, 1, 1, 1]), ("frame 0",)),
        (np.where(np.arange(25)[:, None, None] == 7, np.nan, _poses()), ("frame 7",)),
        (_poses(20), ("25 poses", "20")),
    ],
    ids=["shape", "not a rotation", "nan", "too short"],
)
def test_bad_pose_files(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, poses: np.ndarray, words: tuple[str, ...]) -> None:
    np.save(tmp_path / "poses.npy", poses)
    refused(run(action=None, camera=tmp_path / "poses.npy"), *words)
    assert not (tmp_path / "clip.mp4").exists()


def test_bad_requests(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    refused(run(image=tmp_path / "note.png"), "note.png", "not an image")
    refused(run(image=tmp_path / "absent.png"), "absent.png")
    refused(run(prompt="word " * 600), "tokens", "shorten")
    refused(run(frames=30), "25", "49")
    refused(run(action="w-24,zz-5"), "unknown key 'z'")
    refused(run(output=tmp_path / "clip.gif"), ".gif")
    refused(run(seed=-1), "seed")
    assert not list(tmp_path.glob("clip*"))


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))


def _edit_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_flipped_byte_is_found_before_the_program_is_loaded(run: Callable[..., subprocess.CompletedProcess[str]], damaged: Path) -> None:
    victim = damaged / "programs" / "denoise_first.onnx"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    refused(run(damaged), "denoise_first.onnx", "SHA-256")
    checked = sanawm("verify", damaged)
    assert checked.returncode == 1 and "denoise_first.onnx" in checked.stdout


def test_missing_file(run: Callable[..., subprocess.CompletedProcess[str]], damaged: Path) -> None:
    (damaged / "programs" / "dit.safetensors").unlink()
    refused(run(damaged), "dit.safetensors")
    assert sanawm("verify", damaged).returncode == 1


def test_path_escape(damaged: Path) -> None:
    _edit_manifest(damaged, lambda m: m["files"].update({"../outside": {"size": 1, "sha256": "0" * 64}}))
    refused(sanawm("inspect", damaged), "outside")


def test_newer_schema(damaged: Path) -> None:
    _edit_manifest(damaged, lambda m: m.update(schema_version=99))
    refused(sanawm("inspect", damaged), "newer version", "99")


def test_wrong_target(run: Callable[..., subprocess.CompletedProcess[str]], damaged: Path) -> None:
    def other(m: dict) -> None:
        m["target"] = {"name": "rtx5090", "engine": "tensorrt_rtx", "capability": "sm_120", "platform": None}

    _edit_manifest(damaged, other)
    refused(run(damaged), "rtx5090")


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [("starlette", "serve", "cpu,serve"), ("torch", "calibrate --checkpoint x", "export"), ("torch", "build-engine --target cpu --checkpoint x -o b", "export")],
)
def test_a_package_that_an_extra_brings(package: str, command: str, extra: str, tmp_path: Path, tiny_bundle: Path) -> None:
    arguments = [*command.split(), *([str(tiny_bundle)] if command == "serve" else [])]
    script = f"import sys; sys.modules[{package!r}] = None; from sanawm.cli import main; main(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    refused(result, f"needs {package}, which is not installed; run `pip install 'sanawm[{extra}]'`")


def test_no_such_bundle_or_target(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(sanawm("inspect", tmp_path / "nowhere"), "no such directory")
    refused(sanawm("build-engine", "--checkpoint", tiny_checkpoint, "--target", "rtx6090", "-o", tmp_path / "b"), "rtx6090", "did you mean")
    refused(sanawm("build-engine", "--checkpoint", tmp_path / "none", "--target", "cpu", "-o", tmp_path / "b"), "none")
    refused(sanawm("build-engine", "--target", "cpu", "-o", tmp_path / "b"), "expected --checkpoint or --synthetic, found neither")
    refused(sanawm("build-engine", "--synthetic", "1", "--target", "cpu", "-o", tmp_path / "b"), "--synthetic is for the cuda engine")
    assert not (tmp_path / "b").exists()


def test_build_refuses_to_replace_without_being_told(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    refused(sanawm("build-engine", "--checkpoint", tiny_checkpoint, "--target", "cpu", "-o", tiny_bundle), "exists", "--overwrite")

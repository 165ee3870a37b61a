"""Checkpoints from the hub: addresses, what is fetched, offline use, and each failure as one sentence. No network."""

from __future__ import annotations

import fnmatch
import importlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from sanawm.config import tiny_config
from sanawm.errors import CheckpointError
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.hub import TEXT_FILES, WORLD_FILES, resolve
from sanawm.model.checkpoint.synth import synthesize

# The HTTP library of the installed huggingface_hub.
http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "Efficient-Large-Model/SANA-WM_streaming"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds a tiny checkpoint, read by huggingface_hub's own code."""
    folder = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    synthesize(folder / "snapshots" / COMMIT, "tiny")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


class Hub:
    """Stands in for snapshot_download and records what it was asked."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo": repo_id, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def fake(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Hub:
    hub = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_offline_with_the_real_cache_code(cache: Path) -> None:
    address = f"hf://{REPO}"
    for source, revision in ((address, None), (f"{address}@main", None), (address, COMMIT), (f"{address}@{COMMIT}", None)):
        checkpoint = open_checkpoint(source, revision=revision, offline=True)
        assert checkpoint.commit == COMMIT and checkpoint.kind == "streaming" and checkpoint.source == source
        assert checkpoint.world == tiny_config()


def test_offline_by_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub reads HF_HUB_OFFLINE once, at import, into this constant.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(f"hf://{REPO}").commit == COMMIT
    with pytest.raises(CheckpointError) as info:
        open_checkpoint("hf://owner/other")
    assert str(info.value).startswith("owner/other is not complete in the local hub cache and offline mode is on")


def test_offline_with_a_revision_that_is_not_cached(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{REPO}@v2 is not complete in the local hub cache"):
        open_checkpoint(f"hf://{REPO}@v2", offline=True)


def test_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fake(monkeypatch, synthesize(tmp_path / COMMIT, "tiny"))
    checkpoint = open_checkpoint(f"hf://{REPO}", revision="v1")
    assert checkpoint.commit == COMMIT
    (call,) = hub.calls
    assert (call["repo"], call["revision"], call["local_files_only"]) == (REPO, "v1", False)

    def fetched(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in call["allow_patterns"])

    for wanted in (
        "config.yaml",
        "sana_dit/model.pt",
        "dit/sana_wm_1600m_720p.safetensors",
        "vae/config.json",
        "ltx2_causal_vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert fetched(wanted), wanted
    for heavy in (
        "refiner/transformer/diffusion_pytorch_model.safetensors",
        "refiner/text_encoder/model-00001-of-00005.safetensors",
        "refiner_diffusers/connectors/diffusion_pytorch_model.safetensors",
        "gemma3_12b/model-00001-of-00005.safetensors",
        "sana_dit/optimizer.pt",
    ):
        assert not fetched(heavy), heavy


def test_a_file_inside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = fake(monkeypatch, synthesize(tmp_path / COMMIT, "tiny", layout="bidirectional"))
    checkpoint = open_checkpoint("hf://owner/repo/dit/sana_wm_1600m_720p.safetensors@main")
    assert checkpoint.kind == "file" and len(checkpoint.load_dit()) == 190
    assert hub.calls[0]["revision"] == "main"
    assert hub.calls[0]["allow_patterns"][0] == "dit/sana_wm_1600m_720p.safetensors"
    with pytest.raises(CheckpointError, match=f"owner/repo has no dit/other.safetensors at commit {COMMIT}"):
        open_checkpoint("hf://owner/repo/dit/other.safetensors")


def test_text_encoder_and_vae_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = synthesize(tmp_path / "bare", "tiny", text=False)
    whole = synthesize(tmp_path / "whole", "tiny")
    hub = fake(monkeypatch, whole / "text_encoder")
    assert open_checkpoint(bare, text_encoder="hf://owner/gemma-2-2b-it").text_dir == whole / "text_encoder"
    assert tuple(hub.calls[0]["allow_patterns"]) == TEXT_FILES
    hub = fake(monkeypatch, whole)
    checkpoint = open_checkpoint(bare / "sana_dit" / "model.pt", vae=f"hf://{REPO}")
    assert checkpoint.layout.vae_dir == whole / "ltx2_causal_vae"
    assert "sana_dit/model.pt" not in hub.calls[0]["allow_patterns"]


@pytest.mark.parametrize("address", ["hf://owner", "hf://", "hf://owner/repo@a@b", "hf://ow ner/repo", "hf:///repo"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(CheckpointError, match=r"not a hub address; expected hf://owner/repo\[/path\]\[@revision\]"):
        resolve(address, WORLD_FILES)


def test_revisions_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two revisions"):
        resolve("hf://owner/repo@a", WORLD_FILES, revision="b")
    with pytest.raises(CheckpointError, match="revisions are for hf://"):
        resolve(tmp_path, WORLD_FILES, revision="b")


def _http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = http.Request("GET", "https://hub.example/api")
    return kind("first line\nsecond line", response=http.Response(status, request=request))


@pytest.mark.parametrize(
    "error, match",
    [
        (_http(errors.RepositoryNotFoundError, 404), "not on the hub or is private"),
        (_http(errors.GatedRepoError, 403), "wants its licence accepted"),
        (_http(errors.RevisionNotFoundError, 404), "has no revision v1"),
        (_http(errors.HfHubHTTPError, 503), r"could not be downloaded \(first line\); try again"),
        (errors.LocalEntryNotFoundError("no route"), "could not be reached .* check the network"),
        (errors.HFValidationError("bad name"), r"not a valid hub address \(bad name\)"),
        (http.ConnectError("connection refused"), r"could not be downloaded \(connection refused\)"),
        (ConnectionResetError(), r"could not be downloaded \(ConnectionResetError\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_failures_are_one_sentence(error: Exception, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, error)
    with pytest.raises(CheckpointError, match=match) as info:
        open_checkpoint("hf://owner/repo@v1")
    assert "\n" not in str(info.value) and str(info.value).startswith("owner/repo")

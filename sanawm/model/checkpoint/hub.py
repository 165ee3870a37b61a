"""Checkpoints from the Hugging Face hub: `hf://owner/repo[/path][@revision]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sanawm.errors import CheckpointError
from sanawm.model.checkpoint.lazy import require

SCHEME = "hf://"
# The stage-1 model in its released layouts. The same repositories hold 80 GB of refiner and its text encoder, which these leave out.
WORLD_FILES = (
    "config.yaml",
    "dit/*.safetensors",
    "sana_dit/model.pt",
    "vae/*.safetensors",
    "vae/*.json",
    "ltx2_causal_vae/*.safetensors",
    "ltx2_causal_vae/*.json",
    "model_index.json",
    "transformer/*.safetensors",
    "transformer/*.json",
    "text_encoder/*.safetensors",
    "text_encoder/*.json",
    "tokenizer/*.json",
)
VAE_FILES = tuple(name for name in WORLD_FILES if "vae/" in name)
TEXT_FILES = ("*.safetensors", "*.json")

_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>[^@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Resolved:
    """A source on the local disk; `commit` is the exact revision where it came from the hub."""

    path: Path
    commit: str | None = None


def resolve(source: str | Path, files: Sequence[str], *, revision: str | None = None, offline: bool = False) -> Resolved:
    """The local path of a source, downloading what `files` match (glob patterns) if it is a hub address.

    `revision` (branch, tag or commit) may also stand in the address after `@`. With `offline`, or HF_HUB_OFFLINE=1 in the environment, only
    the hub's local cache is used. Raises CheckpointError for a missing path, a malformed address, and any failure to download.
    """
    text = str(source)
    if not text.startswith(SCHEME):
        if revision is not None:
            raise CheckpointError(f"a revision ({revision}) was given for the local path {text}; revisions are for {SCHEME}owner/repo")
        path = Path(source).expanduser()
        if not path.exists():
            raise CheckpointError(f"{text} does not exist; give a local path or {SCHEME}owner/repo[@revision]")
        return Resolved(path)
    match = _ADDRESS.fullmatch(text.removeprefix(SCHEME).rstrip("/"))
    if match is None:
        raise CheckpointError(f"{text} is not a hub address; expected {SCHEME}owner/repo[/path][@revision]")
    if revision is not None and match["revision"] not in (None, revision):
        raise CheckpointError(f"two revisions were given, {match['revision']} in {text} and {revision}; give one")
    inside = match["path"]
    patterns = list(files) if inside is None else [inside, f"{inside}/*"]
    folder = _download(match["repo"], match["revision"] or revision, patterns, offline)
    path = folder if inside is None else folder / inside
    if not path.exists():
        raise CheckpointError(f"{match['repo']} has no {inside} at commit {folder.name}; see its file list on the hub")
    return Resolved(path, folder.name if _COMMIT.fullmatch(folder.name) else None)


def _download(repo: str, revision: str | None, patterns: list[str], offline: bool) -> Path:
    hub = require("huggingface_hub")
    errors = require("huggingface_hub.errors")
    offline = offline or hub.constants.HF_HUB_OFFLINE
    at = f"{repo}@{revision}" if revision else repo
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{at} wants its licence accepted: open its page on the hub, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{at} is not on the hub or is private; check the name, or log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision}; give a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at} is not a valid hub address ({error}); expected {SCHEME}owner/repo[@revision]") from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            message = "is not complete in the local hub cache and offline mode is on; download it once with the network"
        else:
            message = "could not be reached and is not complete in the local hub cache; check the network and try again"
        raise CheckpointError(f"{at} {message}") from error
    except (OSError, errors.HTTPError, errors.EntryNotFoundError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{at} could not be downloaded ({reason}); try again, finished files are kept") from error

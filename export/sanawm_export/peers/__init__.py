"""Public implementations that `sanawm bench --peer` times on the same GPU, each in a process of its own, after the engine.

A peer is an installed package, of the version that its stand-ins are written for. It writes a result file, whose rows name the cases that they are
peers of.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanawm.errors import UserError


@dataclass(frozen=True)
class Peer:
    """A peer's distribution, the version that is timed, what else it needs, and the module that times it."""

    package: str
    version: str
    needs: str
    module: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version} && pip install {self.needs}"


PEERS = {"sglang": Peer("sglang", "0.5.23", "diffusers msgspec triton", "sanawm_export.peers.sglang_clip")}


def folder(name: str) -> Path:
    """Where a peer's package is installed. Raises UserError where it is not, or in another version; imports nothing of it."""
    peer = PEERS[name]
    try:
        found = importlib.metadata.distribution(peer.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--peer {name} needs the package {peer.package} {peer.version}, which is not installed: {peer.install}") from None
    if found.version != peer.version:
        raise UserError(f"--peer {name} is written for {peer.package} {peer.version}, found {found.version}: {peer.install}")
    return Path(str(found.locate_file("")))


def run(name: str, frames: int) -> dict[str, Any]:
    """The result file of a peer that denoises clips of `frames` frames; what it prints goes to stderr. Raises UserError where it fails."""
    where = folder(name)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / f"{name}.json"
        command = [sys.executable, "-m", PEERS[name].module, str(where), "--frames", str(frames), "-o", str(out)]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the peer {name} ended with exit code {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def attach(rows: Sequence[dict[str, Any]]) -> None:
    """Give every case the fastest of the rows that say `peer_of` of it, which they no longer say afterwards."""
    by_case = {row["case"]: row for row in rows}
    for peer in sorted((row for row in rows if "peer_of" in row), key=lambda row: -row["value"]):
        target = by_case.get(peer.pop("peer_of"))
        if target is not None:
            target["peer"], target["peer_value"] = peer["case"].split(".")[1], peer["value"]

"""The memory of a stream over two hundred chunks, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = """
import json, os, sys
import numpy as np
from sanawm_runtime import World

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with World.open(sys.argv[1], threads=1) as world:
    world.warm_up()
    allocated, bound = [], set()
    allocate, run = world.engine.allocate, world.engine.run
    world.engine.allocate = lambda spec: allocated.append(spec.name) or allocate(spec)
    world.engine.run = lambda name, buffers: bound.update(id(b) for b in buffers.values()) or run(name, buffers)
    stream = world.start(np.full((*world.image_size, 3), 90, np.uint8), "a field")
    made, memory, used, seconds = len(allocated), [], [], []
    for _ in range(int(sys.argv[2])):
        bound.clear()
        poses = np.tile(np.eye(4), (stream.poses_needed, 1, 1))
        poses[:, 2, 3] = 0.02 * (stream.frames_done + np.arange(len(poses)))
        chunk = stream.step(poses)
        assert np.isfinite(chunk.latents).all()
        seconds.append(sum(chunk.seconds.values()))
        del chunk
        memory.append(resident())
        used.append(sorted(bound))
print(json.dumps({"made": made, "later": len(allocated) - made, "memory": memory, "used": used, "seconds": seconds}))
"""
CHUNKS = 200


@pytest.fixture(scope="module")
def ran(tiny_bundle: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle), str(CHUNKS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_no_buffer_is_made_after_the_start(ran: dict[str, Any]) -> None:
    assert ran["made"] > 100 and ran["later"] == 0


def test_the_same_buffers_serve_every_chunk(ran: dict[str, Any]) -> None:
    """From the third chunk on two sets of state take turns, and the rest is one set."""
    used = [set(ids) for ids in ran["used"]]
    assert len(used) == CHUNKS and len(used[3]) > 100
    assert all(ids == used[3] for ids in used[3:])


def test_resident_memory_is_constant(ran: dict[str, Any]) -> None:
    memory = np.array(ran["memory"][3:]) / 2**20
    # The lists above take about one megabyte. One chunk's frames are 4.4 MB; one latent frame kept from each chunk would be 1.1 MB, and one
    # block's attention entries 70 MB.
    assert np.median(memory[-20:]) - np.median(memory[:20]) < 2
    assert memory.max() - memory.min() < 8


def test_time_does_not_grow(ran: dict[str, Any]) -> None:
    seconds = np.array(ran["seconds"][3:])
    # Attention over everything so far would take twenty times as long at the end; fastest of forty, against other load on the machine.
    assert seconds[-40:].min() < 3 * seconds[:40].min()

"""A clip from picture, prompt and camera path to mp4 through `World`, and a cold start in processes of their own.

    python benchmarks/engine_clip.py FOLDER/fp8 -o benchmarks/results/h200-clip.json --work out

The warm engine has made a clip of a few chunks before. A cold start is the time from the start of a process to the first chunk's frames in its
memory, with the bundle's files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "A narrow street of old stone houses after rain, seen by someone who walks along it."
ACTION = "w-240,dw-96,w-144,aw-96,w-240,d-48,w-96"
FIRST = 73


def picture(height: int, width: int) -> np.ndarray:
    """A smooth random picture (H, W, 3) uint8."""
    coarse = np.random.default_rng(0).uniform(0, 255, (height // 64 + 2, width // 64 + 2, 3))
    rows, columns = np.arange(height) / 64, np.arange(width) / 64
    i, j = rows.astype(int), columns.astype(int)
    down, along = (rows - i)[:, None, None], (columns - j)[None, :, None]
    upper = coarse[i][:, j] * (1 - along) + coarse[i][:, j + 1] * along
    lower = coarse[i + 1][:, j] * (1 - along) + coarse[i + 1][:, j + 1] * along
    return (upper * (1 - down) + lower * down).astype(np.uint8)


def cold(bundle: Path) -> None:
    """In a process of its own: open, start, first chunk. Prints the seconds of each."""
    begin = time.perf_counter()
    from sanawm.camera import actions_to_poses
    from sanawm_runtime.world import World

    imported = time.perf_counter()
    with World.open(bundle) as world:
        opened = time.perf_counter()
        stream = world.start(picture(*world.image_size), PROMPT)
        started = time.perf_counter()
        poses = np.asarray(actions_to_poses(ACTION), np.float64)
        chunk = stream.step(poses[: stream.poses_needed])
        done = time.perf_counter()
        assert chunk.frames.any()
        found = {"imports": imported - begin, "open": opened - imported, "start": started - opened, "first chunk": done - started}
        print(json.dumps({"seconds": found}), flush=True)
        stream.close()


def cold_start(bundle: Path) -> tuple[float, dict[str, float]]:
    """Seconds until a new process has its first frames, and of what."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, __file__, "--cold", str(bundle)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode or not line:
        raise SystemExit(f"the new process failed with code {process.returncode}")
    return taken, json.loads(line)["seconds"]


def warm(bundle: Path, frames: int, work: Path, clips: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reports of whole clips with a warm engine, and what the device's memory was."""
    from sanawm_runtime.clip import ClipRequest, generate_clip
    from sanawm_runtime.engines.cuda import CudaEngine
    from sanawm_runtime.video import probe_video
    from sanawm_runtime.world import World

    reports = []
    with World.open(bundle) as world:
        engine = world.engine
        assert isinstance(engine, CudaEngine)
        image = picture(*world.image_size)
        world.warm_up()
        for i, count in enumerate([min(FIRST, frames)] + [frames] * clips):
            path = work / f"clip-{i}.mp4"
            request = ClipRequest(image, PROMPT if not i else f"{PROMPT} Clip {i}.", action=ACTION, frames=count, seed=i)
            report, *_ = generate_clip(world, request, [path])
            probe = probe_video(path)
            if probe["frames"] != count:
                raise SystemExit(f"{path} has {probe['frames']} frames, expected {count}")
            reports.append({**report.to_json(), "bytes": path.stat().st_size})
            path.unlink()  # of random weights it shows noise, in hundreds of megabytes
        memory = {"used_bytes": engine.device.used_bytes(), "peak_bytes": engine.device.peak_bytes, "allocations": engine.device.allocations}
        name = {"hardware": engine.device.name, "driver": engine.device.driver_version}
    return reports[1:], {**name, "memory": memory, "recipe": world.bundle.manifest.precision.recipe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=961)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3, help="cold starts; the first brings the files into the page cache and does not count")
    parser.add_argument("--cold", action="store_true", help="be the new process of a cold start")
    parser.add_argument("--work", type=Path, default=Path("."), help="folder of the videos, which are removed again")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.cold:
        cold(options.bundle)
        return
    starts = [cold_start(options.bundle) for _ in range(options.starts)][1:]
    for taken, parts in starts:
        print(f"cold start {taken:.2f} s: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()), flush=True)
    reports, found = warm(options.bundle, options.frames, options.work, options.clips)
    for report in reports:
        stages = {name: statistics.median(c["stages"][name] for c in report["chunks"]) for name in report["chunks"][0]["stages"]}
        print(f"clip {report['total_s']:.2f} s, start {report['start_s']:.2f}, first frames {report['first_frame_s']:.2f} s; medians "
              + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in stages.items()), flush=True)  # fmt: skip
    print(found["memory"], flush=True)
    if options.output:
        from sanawm_export.cuda.bench_rows import commit, row, versions, write
        from sanawm_runtime.bundle.manifest import utc_now

        recipe = found["recipe"]
        # Where the videos were is of no interest: they are removed again.
        clips = [{**report, "outputs": [Path(output).name for output in report["outputs"]]} for report in reports]
        rows = [
            row(f"engine.clip.{options.frames}f.{recipe}", "wall", [r["total_s"] for r in reports], None,
                "picture, prompt and camera path to a finished mp4 (libx264), without the refiner; warm engine, a prompt not seen before"),
            row(f"engine.clip.first.{recipe}", "wall", [r["first_frame_s"] for r in reports], None, "from the request to the first chunk in the mp4"),
            row(f"engine.cold.{recipe}", "wall", [taken for taken, _ in starts], None, "process start to the first chunk's frames; files in the page cache"),
        ]  # fmt: skip
        write(options.output, {
            "hardware": found["hardware"], "driver": found["driver"], "versions": versions(), "commit": commit(), "date": utc_now()[:10],
            "notes": "random weights in files", "rows": rows, "clips": clips, "starts": starts, "memory": found["memory"],
        })  # fmt: skip


if __name__ == "__main__":
    main()

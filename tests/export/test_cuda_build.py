"""Bundles for the CUDA engine: what is in them, what is refused, and a kernel that is really compiled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import cuda_fake

from sanawm.config import tiny_config
from sanawm.errors import UserError
from sanawm.model.checkpoint import open_checkpoint
from sanawm.model.checkpoint.synth import synthesize
from sanawm.programs import Geometry, programs
from sanawm_export.build import BuildRequest
from sanawm_export.cuda import build
from sanawm_export.cuda.synthetic import SyntheticCheckpoint
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.chunk import plans as chunk
from sanawm_runtime.engines._cuda_device import Gpu
from sanawm_runtime.engines._cuda_kernels import Arguments, read_index
from sanawm_runtime.engines._cuda_plan import Launch, Plan
from sanawm_runtime.engines._cuda_weights import contents, read_table
from sanawm_runtime.engines.cuda import CudaEngine
from sanawm_runtime.targets import resolve_target

SEED = 11
COMPILED = build.compiled


def fake_compile(variants: Mapping[str, KernelVariant], target: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """An index entry and bytes for each variant, without a compiler."""
    for name, variant in variants.items():
        assert target in variant.targets, f"{name} is not meant for sm_{target}"
        yield cuda_fake.index_entry(variant, f"sm_{target}"), name.encode()


def request(checkpoint: Any, target: str = "h200", precision: str = "bf16") -> BuildRequest:
    return BuildRequest(checkpoint, resolve_target(target), "cuda", precision)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_checkpoint(synthesize(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny", seed=SEED))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiled", fake_compile)


def test_a_seed_gives_the_weights_of_the_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    """Packed from files and made from the seed, both by the bundles' own tables, in bfloat16 and FP8."""
    stored = build.build_cuda(request(checkpoint, precision="fp8"), tmp_path / "stored")
    seeded = build.build_cuda_synthetic(request(SyntheticCheckpoint(checkpoint.world, SEED), precision="fp8"), tmp_path / "seeded", SEED)
    for part in ("dit", "vae", "image", "text"):
        tables = [read_table(bundle.read(f"weights/{part}.json"), part) for bundle in (stored, seeded)]
        assert tables[0].tensors == tables[1].tensors
        count = 0
        for (packed, left), (_, right) in zip(contents(tables[0], stored), contents(tables[1], seeded), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=packed.name)
            count += left.any()
        assert count > 100 if part == "dit" else count == len(tables[0].tensors)
    assert not any(name.endswith(".safetensors") for name in seeded.manifest.files)


def test_a_bundle_says_what_it_has(checkpoint: Any, tmp_path: Path) -> None:
    bundle = build.build_cuda(request(checkpoint), tmp_path / "bundle")
    names = set(bundle.manifest.programs)
    assert names == {*programs(Geometry(checkpoint.world, 600)), "euler.3", "euler.4"}
    assert bundle.manifest.target.capability == "sm_90"
    assert any("run on an H200 with random weights" in sentence for sentence in bundle.manifest.unverified)
    index = read_index(bundle.read("kernels/index.json"), "index")
    for name, entry in bundle.manifest.programs.items():
        plan = Plan.from_json(bundle.read(entry.file), name)
        assert entry.extras["arena"] == plan.arena
        for step in plan.steps:
            if isinstance(step, Launch):
                assert set(step.arguments) == {p.name for p in index[step.kernel].arguments}


def test_every_program_of_a_build_can_be_enqueued(checkpoint: Any, tmp_path: Path) -> None:
    """Alignment, sizes, grids and parameters of bfloat16 kernels for Hopper, as the driver would see them."""
    bundle = build.build_cuda(request(checkpoint), tmp_path / "bundle")
    entries = {e["name"].encode(): e for e in json.loads(bundle.read("kernels/index.json"))["kernels"]}
    writes = {}
    for entry in bundle.manifest.programs.values():
        plan = Plan.from_json(bundle.read(entry.file))
        writes |= {step.kernel: step.writes for step in plan.steps if isinstance(step, Launch)}
    driver = cuda_fake.FakeDriver(entries, writes)
    engine = CudaEngine(bundle, Gpu(driver=driver))
    for name, program in bundle.manifest.programs.items():
        if name.startswith("euler"):
            continue
        specs = {t.name: build.TensorSpec(t.name, t.dtype, t.shape) for t in (*program.inputs, *program.outputs)}
        buffers = {key: engine.allocate(spec) for key, spec in specs.items()}
        engine.run(name, buffers)
        if name == "denoise_first":
            engine.euler(buffers["latents"], buffers["velocity"], 0.04, True)
    assert {launch.kernel for launch in driver.launches} >= {"chunk.euler_step.4x60.bf16"}
    buffers.clear()
    engine.close()


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("h200", "nvfp4", "NVFP4 kernels for sm_120"),
        ("rtx3090", "fp8", "no FP8 tensor cores"),
        ("cpu", "bf16", "needs a GPU target"),
        ("h200", "int4", "unknown recipe 'int4'"),
    ],
)
def test_what_cannot_be_built_is_refused(target: str, precision: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build.build_cuda_synthetic(request(SyntheticCheckpoint(tiny_config(), 1), target, precision), tmp_path / "bundle", 1)
    assert not (tmp_path / "bundle").exists()


def test_nvfp4_without_calibration_says_what_it_assumes(tmp_path: Path) -> None:
    bundle = build.build_cuda_synthetic(request(SyntheticCheckpoint(tiny_config(), 1), "rtx5090", "mixed"), tmp_path / "bundle", 1)
    assert any("512" in sentence for sentence in bundle.manifest.unverified)
    assert bundle.manifest.precision.summary["products"]["nvfp4"] > 0


def test_a_compiled_kernel_takes_what_the_engine_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variants = {v.name: v for v in (chunk.euler_step("bf16", 3, 880), chunk.transpose("fp32", "bf16"))}
    results = list(COMPILED(variants, 90, jobs=1))
    index = read_index(json.dumps({"kernels": [entry for entry, _ in results]}).encode(), "index")
    assert {cubin[:4] for _, cubin in results} == {b"\x7fELF"}
    kernel = index["chunk.euler_step.3x880.bf16"]
    assert kernel.arch == "sm_90" and len(kernel.hidden) == 2
    # Offsets come from the ELF image: two pointers, a float and two integers, two hidden pointers.
    assert [tuple(p) for p in kernel.parameters] == [(0, 8), (8, 8), (16, 4), (20, 4), (24, 4), (32, 8), (40, 8)]
    assert Arguments(kernel, (0x1000, 0x2000, 0.04, 3 * 880 * 128, 1)).address

"""The target table and the check of a bundle against this machine."""

import pytest

from sanawm.errors import BundleError, UserError
from sanawm_runtime.bundle import TargetEntry
from sanawm_runtime.targets import PRECISIONS, TARGETS, check_target, present_platform, resolve_target


@pytest.mark.parametrize(
    ("text", "name", "capability"),
    [
        ("rtx5090", "rtx5090", "sm_120"),
        ("RTX 5090", "rtx5090", "sm_120"),
        ("NVIDIA GeForce RTX 4090", "rtx4090", "sm_89"),
        ("rtx3090", "rtx3090", "sm_86"),
        ("rtx_5080", "rtx5080", "sm_120"),
        ("h100", "h100", "sm_90"),
        ("H200", "h200", "sm_90"),
        ("b200", "b200", "sm_100"),
        ("gb300", "gb300", "sm_103"),
        ("dgx spark", "dgx-spark", "sm_121"),
        ("cpu", "cpu", None),
        ("sm_120", "sm_120", "sm_120"),
        ("SM89", "sm_89", "sm_89"),
        ("8.6", "sm_86", "sm_86"),
        ("12.1", "sm_121", "sm_121"),
    ],
)
def test_resolves(text, name, capability):
    target = resolve_target(text)
    assert (target.name, target.capability) == (name, capability)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx5900", "did you mean rtx5090"),
        ("h20", "did you mean h200"),
        ("tpu", r"choose one of rtx5090, .*, cpu, or a compute capability like sm_120"),
        ("", "unknown target"),
        ("sm_120a", "give the plain capability, sm_120"),
        ("sm_100f", "give the plain capability, sm_100"),
        ("sm_70", "no engine serves sm_70; the capabilities served are sm_75"),
        ("9.9", "no engine serves sm_99"),
    ],
)
def test_refuses_with_a_hint(text, message):
    with pytest.raises(UserError, match=message):
        resolve_target(text)


def test_every_target_is_served_and_names_known_precisions():
    for target in TARGETS.values():
        assert target.engines
        for precisions in target.precisions.values():
            assert precisions and set(precisions) <= set(PRECISIONS)


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "gb300", "sm_87", "sm_110"])
def test_tensorrt_rtx_is_not_offered_where_it_refuses_to_build(name):
    target = resolve_target(name)
    assert target.engines[0] == "cuda"
    with pytest.raises(UserError, match=r"the tensorrt_rtx engine does not serve .*; use --engine cuda or tensorrt"):
        target.require("tensorrt_rtx", "bf16")


@pytest.mark.parametrize(
    ("name", "engine", "precision", "allowed"),
    [
        ("rtx5090", "tensorrt_rtx", "nvfp4", True),
        ("dgx-spark", "tensorrt_rtx", "nvfp4", True),
        ("rtx4090", "tensorrt_rtx", "fp8", True),
        ("rtx4090", "tensorrt_rtx", "nvfp4", False),
        ("rtx3090", "tensorrt_rtx", "fp8", False),
        ("sm_80", "tensorrt_rtx", "bf16", False),
        ("sm_80", "cuda", "bf16", True),
        ("h200", "cuda", "fp8", True),
        ("h200", "cuda", "nvfp4", False),
        ("b200", "tensorrt", "nvfp4", True),
        ("cpu", "onnxruntime", "fp32", True),
        ("cpu", "onnxruntime", "fp8", False),
    ],
)
def test_precisions(name, engine, precision, allowed):
    target = resolve_target(name)
    if allowed:
        target.require(engine, precision)
        return
    with pytest.raises(UserError, match=f"does not compute {precision} with the {engine} engine; use --precision"):
        target.require(engine, precision)


def test_check_target_accepts_its_own_device_and_any_for_the_cpu():
    check_target(TargetEntry("rtx5090", "cuda", "sm_120", "linux-x86_64"), "sm_120", "linux-x86_64")
    check_target(TargetEntry("rtx5090", "cuda", "sm_120", None), "sm_120", "win32-x86_64")
    check_target(TargetEntry("cpu", "onnxruntime"), None, present_platform())
    check_target(TargetEntry("cpu", "onnxruntime"), "sm_90")


@pytest.mark.parametrize(
    ("capability", "platform", "message"),
    [
        (None, None, r"is for rtx5090 \(sm_120\), and no NVIDIA GPU was found here; .*--target cpu"),
        ("sm_121", None, r"the GPU here is sm_121; build one with `sanawm build-engine --target sm_121`"),
        ("sm_120", "linux-aarch64", r"is for linux-x86_64, and this machine is linux-aarch64"),
    ],
)
def test_check_target_says_what_differs(capability, platform, message):
    with pytest.raises(BundleError, match=message):
        check_target(TargetEntry("rtx5090", "cuda", "sm_120", "linux-x86_64"), capability, platform)

"""Targets: the devices a bundle can be built for, and which engines and precisions serve them."""

from __future__ import annotations

import difflib
import platform as _platform
import re
import sys
from dataclasses import dataclass

from sanawm.errors import BundleError, UserError
from sanawm_runtime.bundle.manifest import Engine, TargetEntry

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "nvfp4")

# Compute capabilities TensorRT-RTX 1.7 builds for and loads on, with what it accepted there. Tried by building on a machine without a GPU;
# FP8 on sm_89 is NVIDIA's statement.
_RTX = {
    75: ("fp16",),
    80: ("fp16",),
    86: ("fp16", "bf16"),
    89: ("fp16", "bf16", "fp8"),
    120: ("fp16", "bf16", "fp8", "nvfp4"),
    121: ("fp16", "bf16", "fp8", "nvfp4"),
}
# Capabilities with tensor cores for each precision, which is what full TensorRT and our own kernels go by.
_HARDWARE = {
    75: ("fp16",),
    80: ("fp16", "bf16"),
    86: ("fp16", "bf16"),
    87: ("fp16", "bf16"),
    89: ("fp16", "bf16", "fp8"),
    90: ("fp16", "bf16", "fp8"),
    100: ("fp16", "bf16", "fp8", "nvfp4"),
    103: ("fp16", "bf16", "fp8", "nvfp4"),
    110: ("fp16", "bf16", "fp8", "nvfp4"),
    120: ("fp16", "bf16", "fp8", "nvfp4"),
    121: ("fp16", "bf16", "fp8", "nvfp4"),
}


@dataclass(frozen=True)
class Target:
    """A device to build for.

    `capability` is None for the CPU. `precisions` maps each engine that can serve the target, the preferred one first, to what it can
    compute there. `memory_gb` is the device's memory (None: differs or unknown).
    """

    name: str
    capability: str | None
    precisions: dict[Engine, tuple[str, ...]]
    memory_gb: int | None
    notes: str

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(self.precisions)

    def require(self, engine: str, precision: str) -> None:
        """Raise UserError unless `engine` serves this target in `precision`, one of `PRECISIONS`."""
        if engine not in self.precisions:
            raise UserError(f"the {engine} engine does not serve {self.name}; use --engine {' or '.join(self.engines)}")
        allowed = self.precisions[engine]  # type: ignore[index]
        if precision not in allowed:
            raise UserError(f"{self.name} does not compute {precision} with the {engine} engine; use --precision {' or '.join(allowed)}")


def _gpu(name: str, number: int, memory_gb: int | None, notes: str) -> Target:
    precisions: dict[Engine, tuple[str, ...]] = {}
    if number in _RTX:
        precisions["tensorrt_rtx"] = _RTX[number]
    if number >= 80:  # our Triton kernels accumulate products of bfloat16, which Turing does not have
        precisions["cuda"] = _HARDWARE[number]
    precisions["tensorrt"] = _HARDWARE[number]
    return Target(name, f"sm_{number}", precisions, memory_gb, notes)


_NAMED = (
    _gpu("rtx5090", 120, 32, "GeForce RTX 5090 (Blackwell)"),
    _gpu("rtx5080", 120, 16, "GeForce RTX 5080 (Blackwell)"),
    _gpu("rtx4090", 89, 24, "GeForce RTX 4090 (Ada); no NVFP4"),
    _gpu("rtx3090", 86, 24, "GeForce RTX 3090 (Ampere); no FP8, no NVFP4"),
    _gpu("h100", 90, 80, "H100 (Hopper); TensorRT-RTX does not run on it"),
    _gpu("h200", 90, 141, "H200 (Hopper); TensorRT-RTX does not run on it"),
    _gpu("b200", 100, 180, "B200 (data-centre Blackwell); TensorRT-RTX does not run on it"),
    _gpu("gb300", 103, 288, "GB300 (Blackwell Ultra); TensorRT-RTX does not run on it"),
    _gpu("dgx-spark", 121, 128, "DGX Spark (GB10, arm64); memory shared with the CPU"),
    Target("cpu", None, {"onnxruntime": ("fp32", "bf16")}, None, "any machine; the judge of the exported graphs"),
)
TARGETS: dict[str, Target] = {target.name: target for target in _NAMED}

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_GENERIC = re.compile(r"(?:sm_?(\d{2,3})|(\d{1,2})\.(\d))([af]?)")


def resolve_target(text: str) -> Target:
    """The target that a user's word means: a name from `TARGETS` ("rtx5090", "RTX 5090"), or a capability ("sm_120", "12.0").

    Raises UserError that lists the names, and the nearest one.
    """
    word = text.strip().lower()
    if match := _GENERIC.fullmatch(word):
        number = int(match[1] or match[2] + match[3])
        if match[4]:
            raise UserError(f"target '{text}': give the plain capability, sm_{number}; the builder picks the variant of each kernel itself")
        if number not in _HARDWARE:
            known = ", ".join(f"sm_{known}" for known in _HARDWARE)
            raise UserError(f"target '{text}': no engine serves sm_{number}; the capabilities served are {known}")
        return _gpu(f"sm_{number}", number, None, f"any GPU of compute capability {number // 10}.{number % 10}")
    plain = {_squeeze(name): target for name, target in TARGETS.items()}
    squeezed = _squeeze(word)
    if squeezed in plain:
        return plain[squeezed]
    near = difflib.get_close_matches(squeezed, plain, n=1)
    hint = f"did you mean {plain[near[0]].name}? " if near else ""
    raise UserError(f"unknown target '{text}': {hint}choose one of {', '.join(TARGETS)}, or a compute capability like sm_120")


def _squeeze(word: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", word)


def present_platform() -> str:
    """This machine's platform as a manifest writes it, for example "linux-x86_64"."""
    machine = _platform.machine().lower()
    return f"{sys.platform}-{_MACHINES.get(machine, machine)}"


def check_target(target: TargetEntry, capability: str | None, platform: str | None = None) -> None:
    """Refuse a bundle for `target` on a device of `capability` (None: no GPU) and `platform` (None: not checked) that cannot run it.

    Capabilities must be equal: compiled kernels use features of one architecture (an sm_120a kernel does not load on sm_121). Raises
    BundleError.
    """
    if target.capability is not None and target.capability != capability:
        wanted = target.capability if target.name == target.capability else f"{target.name} ({target.capability})"
        if capability is None:
            raise BundleError(
                f"this bundle is for {wanted}, and no NVIDIA GPU was found here; check the driver with `nvidia-smi`, "
                "or build one for this machine with `sanawm build-engine --target cpu`"
            )
        raise BundleError(
            f"this bundle is for {wanted}, and the GPU here is {capability}; build one with `sanawm build-engine --target {capability}`"
        )
    if platform is not None and target.platform is not None and target.platform != platform:
        raise BundleError(f"this bundle is for {target.platform}, and this machine is {platform}; build one on a machine like this")

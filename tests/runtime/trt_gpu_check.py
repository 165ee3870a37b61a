"""The plugin's enqueue path on a real GPU: cubins compiled for it, launched through the very class that engines call, against the definition.

Run by hand where there is a GPU, a driver, cuda-python, torch, triton and the TensorRT-RTX wheels; the library itself does not have to support the GPU:

    python tests/runtime/trt_gpu_check.py            # small and full size; exit status 1 when an output is off
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "export"))

from interpret_launches import definition, places_of, random_case

from sanawm_export.tensorrt.gdn_launches import gdn_launches, output_operands
from sanawm_export.tensorrt.kernels import KernelCompiler
from sanawm_kernels.gdn.plans import Problem
from sanawm_runtime.engines._trt_device import Device, host_array
from sanawm_runtime.engines._trt_launch import Operand
from sanawm_runtime.engines._trt_library import open_library
from sanawm_runtime.engines._trt_plugin import make_plugin

# bfloat16 operands keep 8 bits, and sums over 880 tokens average their errors; states are float32 sums of such products.
TOLERANCE = 2e-2


def check(device: Device, compiler: KernelCompiler, problem: Problem) -> dict[str, float]:
    """Largest error of each output relative to its largest value."""
    operands = random_case(problem, torch.bfloat16)
    described = [Operand(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in operands.values()]
    launches = gdn_launches(problem, device.capability, described, places_of(problem, operands), compiler.compile)
    inputs = []
    for tensor in operands.values():
        stored = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        inputs.append(device.allocate(stored.nbytes, "an input"))
        device.copy_in(inputs[-1], stored)
    outputs = [device.allocate(o.nbytes, "an output") for o in launches.outputs]
    for address, operand in zip(outputs, launches.outputs, strict=True):
        device.copy_in(address, np.full(operand.nbytes, 0xFF, np.uint8))  # NaN in every format
    workspace = device.allocate(launches.workspace, "scratch memory")
    plugin = make_plugin(open_library("tensorrt_rtx"), launches)
    plugin.enqueue([], [], inputs, outputs, workspace, int(device.stream))
    wanted = definition(problem, {name: t.double() for name, t in operands.items()})
    errors = {}
    for (name, operand), address in zip(output_operands(problem).items(), outputs, strict=True):
        stored = host_array(operand.dtype, operand.shape)
        device.copy_out(stored, address)
        found = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16) if operand.dtype == "bfloat16" else torch.from_numpy(stored)
        errors[name] = float((found.double() - wanted[name]).abs().max() / wanted[name].abs().max())
    for address in (*inputs, *outputs, workspace):
        device.free(address)
    return errors


def main() -> int:
    device = Device()
    print(f"{device.name}, {device.capability}, driver for CUDA {device.driver_version}")
    worst = 0.0
    with KernelCompiler(device.capability) as compiler:
        for heads, width, tokens in ((4, 32, 60), (20, 112, 880)):
            for frames, has_state, commit in ((4, False, True), (3, True, False), (3, True, True)):
                scale = (width * tokens) ** -0.5
                errors = check(device, compiler, Problem(1, heads, width, frames, tokens, scale, has_state=has_state, commit=commit))
                print(f"{heads}x{width}, {frames} frames of {tokens}, state {has_state}, commit {commit}: {errors}")
                # NaN counts as wrong.
                worst = max(worst, *(error if error == error else float("inf") for error in errors.values()))
    device.close()
    print(f"worst {worst:.2e}, allowed {TOLERANCE:g}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

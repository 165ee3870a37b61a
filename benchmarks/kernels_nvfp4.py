"""Errors of emulated NVFP4 products on a Hopper GPU against the exact format: cubins of another machine's compiler, launched through cuda-python.

    sanawm kernels build --target sm_90 --emulate-nvfp4 --only 'gemm.*nvfp4*' -o kernels-out     # Triton 3.9; no GPU needed
    python benchmarks/kernels_nvfp4.py kernels-out/sm_90                                         # on the GPU; any Triton

Every operand is random with outlier channels and every output starts as NaN. The judge is the plain definition on the same codes and scales.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sanawm_export.cuda.definitions import DEFINITIONS
from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.gemm.variants import emulated
from sanawm_kernels.quant.formats import Nvfp4Tensor, quantize_nvfp4
from sanawm_kernels.quant.request import Quantize
from sanawm_kernels.tokenwise import naive
from sanawm_kernels.tokenwise.launch import TYPE_NAMES
from sanawm_runtime.engines._cuda_device import Gpu, check_capability
from sanawm_runtime.engines._cuda_kernels import Arguments, read_index

FRAMES = 3
NOTES = "relative L2 errors of emulated NVFP4 products against their definition on the same codes; random operands with outlier channels"
BF16_ROUNDING = 2.0**-9
DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
Launch = Callable[[KernelVariant, Mapping[str, Any]], None]


def operands(variant: KernelVariant, rows: int, random: torch.Generator, device: str) -> dict[str, Any]:
    """Arguments of a product or a temporal convolution of `rows` tokens; outputs are NaN."""
    c = variant.constexprs
    columns, depth = c["N"], c.get("K", c.get("C"))
    taps, tokens = (3, c["FRAME"]) if "FRAME" in c else (c["PITCH"] // depth, c["TOKENS"])
    read = taps * depth if "FRAME" in c else depth

    def normal(count: int, width: int) -> Tensor:
        x = torch.randn(count, width, generator=random)
        x[:, ::97] *= 30
        return x

    def coded(x: Tensor) -> Nvfp4Tensor:
        found = quantize_nvfp4(x)
        return Nvfp4Tensor(found.packed.to(device), found.scales.to(device), found.global_scale.to(device).reshape(1), found.layout)

    a = coded(normal(rows, depth))
    b = coded(normal(columns, taps * depth) / (taps * depth) ** 0.5)
    given: dict[str, Any] = {"a": a.packed, "a_scales": a.scales, "a_scale": a.global_scale, "b_scale": b.global_scale}
    given |= {"b": b.packed[:, : read // 2], "b_scales": b.scales[:, : read // 16]}
    shapes = {"bias": (columns,), "carried": (tokens, columns), "frame_gate": (-(-rows // tokens), columns)}
    for name, kind in variant.signature.items():
        if name.endswith("_row"):
            given[name] = given[name.removesuffix("_row")].stride(0)
        elif name in ("codes", "scales", "quant_scale", "squares", "out") or name in given or not kind.startswith("*"):
            continue
        else:
            shape = shapes.get(name, (rows, columns))
            given[name] = normal(1, shape[0])[0] if len(shape) == 1 else normal(*shape)
            given[name] = given[name].to(DTYPES[kind[1:].partition(":")[0]]).to(device)
    if "quant_scale" in variant.signature:
        given["quant_scale"] = torch.full((1,), 0.02, device=device)
    return given | outputs(variant, rows, device) | {"M": rows}


def outputs(variant: KernelVariant, rows: int, device: str) -> dict[str, Tensor]:
    """What the variant writes, with all bits set: NaN in every float type."""
    c = variant.constexprs
    columns = c["N"]
    widths = {"out": columns, "codes": columns // 2, "scales": columns // 16, "squares": -(-columns // (c["BN"] // c["SLICES"]))}
    found = {}
    for name, width in widths.items():
        if name in variant.signature:
            dtype = DTYPES[variant.signature[name][1:].partition(":")[0]]
            found[name] = torch.full((rows, width * dtype.itemsize), 255, dtype=torch.uint8, device=device).view(dtype)
    return found


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def errors(variant: KernelVariant, rows: int, random: torch.Generator, device: str, launch: Launch) -> dict[str, float]:
    """Relative L2 error of each output; codes count by the numbers that they and the kernel's own plain rows stand for."""
    given = operands(variant, rows, random, device)
    launch(variant, given)
    want = {**given, **outputs(variant, rows, device)}
    constants = {**variant.constexprs}
    DEFINITIONS[variant.kernel](want, constants)
    found = {name: error(given[name], want[name]) for name in ("out", "squares") if name in variant.signature}
    if "codes" in variant.signature:
        made = Nvfp4Tensor(given["codes"], given["scales"], given["quant_scale"].reshape(())).dequantize()
        # From the rounding before the codes on: where the kernel keeps plain rows, what they should have become.
        request = Quantize("nvfp4", given["quant_scale"].reshape(()))
        exact = naive.quantize_activations(given["out"], request).quantized if "out" in given else None
        wanted = exact or Nvfp4Tensor(want["codes"], want["scales"], want["quant_scale"].reshape(()))
        found["codes"] = error(made, wanted.dequantize())
    return found


class Cubins:
    """Kernels of a directory that `sanawm kernels build` wrote, on one GPU."""

    def __init__(self, folder: Path, device: Gpu) -> None:
        self._device, self._folder = device, folder
        self._kernels = read_index((folder / "index.json").read_bytes(), str(folder / "index.json"))
        self._functions: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kernels

    def launch(self, variant: KernelVariant, given: Mapping[str, Any], stream: Any = 0) -> None:
        """Run a variant and wait for it."""
        kernel = self._kernels[variant.name]
        if kernel.name not in self._functions:
            image = (self._folder / kernel.file).read_bytes()
            self._functions[kernel.name] = self._device.function(image, kernel.entry, kernel.shared_bytes)
        values = [given[p.name].data_ptr() if isinstance(given[p.name], Tensor) else given[p.name] for p in kernel.arguments]
        arguments = Arguments(kernel, values)
        grid = variant.launch_grid({name: value for name, value in given.items() if isinstance(value, int)})
        self._device.call("cuCtxSynchronize")
        self._device.launch(self._functions[kernel.name], grid, kernel.threads, kernel.shared_bytes, stream, arguments.address)
        self._device.call("cuCtxSynchronize")


@click.command()
@click.argument("cubins", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Results file (default: benchmarks/results/<hardware>-nvfp4.json).")
def main(cubins: Path, output: Path | None) -> None:
    """Check every emulated product that CUBINS holds."""
    import kernel_timing

    if not torch.cuda.is_available():
        raise click.UsageError("no CUDA device was found; run this on a Hopper GPU")
    device = Gpu()
    check_capability(device, "sm_90")
    kernels, sizes = Cubins(cubins, device), ModelSizes()
    random = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    rows: list[dict[str, Any]] = []
    for variant in emulated(sizes):
        # A chunk of four frames has the kernels of its own length.
        tokens = variant.constexprs.get("BATCH", FRAMES * sizes.tokens_per_frame)
        if variant.name in kernels:
            for name, value in errors(variant, tokens, random, "cuda", kernels.launch).items():
                rows.append({"case": f"{variant.name}.{name}", "metric": "relative L2 error", "value": value, "unit": "", "n": 1, "floor": BF16_ROUNDING,
                             "peer": None, "peer_value": None, "includes": "against the definition on the same codes"})  # fmt: skip
                click.echo(f"{rows[-1]['case']:100s} {value:.2e}")
    if not rows:
        raise click.UsageError(f"{cubins} has no emulated NVFP4 product; build it with --target sm_90 --emulate-nvfp4")
    result = {**kernel_timing.environment(), "notes": NOTES, "rows": rows}
    hardware = result["hardware"].lower().replace("nvidia ", "").replace(" ", "-")
    kernel_timing.write(output or kernel_timing.ROOT / "benchmarks" / "results" / f"{hardware}-nvfp4.json", result)


if __name__ == "__main__":
    main()

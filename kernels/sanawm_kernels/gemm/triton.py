"""Triton implementations of the products, with the signatures of `naive`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.gemm import plans, table
from sanawm_kernels.gemm.naive import Epilogue, Operand, Product, output_dtype
from sanawm_kernels.quant.formats import Fp8Tensor, Nvfp4Tensor
from sanawm_kernels.quant.request import empty_quantized
from sanawm_kernels.tokenwise.launch import launch, matching_rows, multiprocessors, native_fp4, rows, target, type_name, vector
from sanawm_kernels.tokenwise.row_ops import quantized_arguments


def describe(x: Operand, what: str) -> tuple[plans.Operand, Tensor]:
    """How an operand arrives, and its stored numbers."""
    if isinstance(x, Fp8Tensor):
        if x.scale.dtype != torch.float32 or not x.scale.is_contiguous() or (x.scale.dim() and x.scale.shape != x.values.shape[:-1]):
            raise ValueError(
                f"{what}: expected contiguous float32 scales () or {tuple(x.values.shape[:-1])}, found {tuple(x.scale.shape)} {x.scale.dtype}"
            )
        return plans.Operand("fp8", row_scales=x.scale.dim() > 0), x.values
    if isinstance(x, Nvfp4Tensor):
        if not x.scales.is_contiguous() or x.global_scale.dtype != torch.float32 or x.global_scale.dim():
            raise ValueError(
                f"{what}: expected contiguous block scales and a float32 global scale (), found a {tuple(x.global_scale.shape)} one"
            )
        return plans.Operand("nvfp4", swizzled=x.layout == "swizzled"), x.packed
    return plans.Operand(type_name(x, what)), x


def _scales(prefix: str, x: Operand) -> dict[str, Tensor]:
    if isinstance(x, Fp8Tensor):
        return {f"{prefix}_scale": x.scale}
    if isinstance(x, Nvfp4Tensor):
        return {f"{prefix}_scales": x.scales, f"{prefix}_scale": x.global_scale}
    return {}


def _depth(stored: Tensor, operand: plans.Operand) -> int:
    return stored.shape[-1] * (2 if operand.kind == "nvfp4" else 1)


class _Finishing:
    """Outputs and arguments of an epilogue on rows of `shape` (B, T*S, N)."""

    def __init__(self, epilogue: Epilogue, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str) -> None:
        B, tokens, N = shape
        self.arguments: dict[str, Any] = {}
        out = type_name(torch.empty(0, dtype=dtype), f"{what} output")
        if epilogue.bias is not None:
            self.arguments["bias"] = vector(epilogue.bias, 2 * N if epilogue.glu else N, f"{what} bias")
        for name in ("add", "gate", "residual", "extra"):
            value = getattr(epilogue, name)
            if value is not None:
                if value.dtype != dtype:
                    raise ValueError(f"{what} {name}: expected the output's dtype {dtype}, found {value.dtype}")
                value = matching_rows(value, shape, f"{what} {name}")
                self.arguments |= {name: value, f"{name}_row": value.stride(0)}
        self.tokens = tokens
        frame_gate = None
        if epilogue.frame_gate is not None:
            gate = epilogue.frame_gate
            if gate.dim() != 3 or gate.shape[0] != B or gate.shape[2] != N or tokens % gate.shape[1]:
                raise ValueError(
                    f"{what}: expected a frame gate ({B}, T, {N}) for {tokens} tokens in whole frames, found {tuple(gate.shape)}"
                )
            flat = rows(gate, f"{what} frame gate")
            self.arguments |= {"frame_gate": flat, "frame_gate_row": flat.stride(0)}
            self.tokens, frame_gate = tokens // gate.shape[1], type_name(gate, f"{what} frame gate")
        request = epilogue.quantize
        keep = request is None or request.keep
        self.plain = torch.empty(shape, dtype=dtype, device=device) if keep else None
        self.quantized = empty_quantized(shape, request, device)
        self.arguments |= quantized_arguments(self.quantized, request, device)
        if keep:
            self.arguments["out"] = self.plain
        self.squares: Tensor | None = None
        self.finish = plans.Finish(
            out=out, keep=keep, bias=epilogue.bias is not None, silu=epilogue.silu, glu=epilogue.glu, add=epilogue.add is not None,
            gate=epilogue.gate is not None, frame_gate=frame_gate, residual=epilogue.residual is not None, extra=epilogue.extra is not None,
            squares=epilogue.squares, quant=request.kind if request else None, swizzled=request is not None and request.layout == "swizzled",
            native=native_fp4(device) and request is not None and request.kind == "nvfp4",
            weight="bf16" if epilogue.bias is None else type_name(epilogue.bias, f"{what} bias"),
        )  # fmt: skip
        self._shape, self._device, self._wanted = shape, device, epilogue.squares

    def make_squares(self, width: int) -> None:
        """Allocate the partial sums of squares of slices `width` columns wide."""
        if self._wanted:
            B, tokens, N = self._shape
            self.squares = torch.empty(B, tokens, -(-N // width), dtype=torch.float32, device=self._device)
            self.arguments["squares"] = self.squares

    def result(self) -> Product:
        return Product(self.plain, self.quantized, self.squares)


def _programs(config: plans.Config, device: torch.device) -> dict[str, int]:
    """The size a persistent grid needs."""
    if not config.persistent:
        return {}
    return {"SMS": multiprocessors(device)}


def linear(x: Operand, weight: Operand, epilogue: Epilogue | None = None, *, config: plans.Config | None = None) -> Product:
    """See `naive.linear`; `config` overrides the table's tile (for tuning)."""
    return _linear("linear", x, weight, epilogue or Epilogue(), config)


def carried_products(s: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
    """See `naive.carried_products`."""
    product = _linear("carried_products", s, weight, Epilogue(dtype=dtype), None, taps=3).plain
    assert product is not None
    return product


def _linear(what: str, x: Operand, weight: Operand, epilogue: Epilogue, config: plans.Config | None, taps: int = 1) -> Product:
    """A product with a weight, or with the first of `taps` that its rows hold one after the other."""
    (a, values), (b, weights) = describe(x, f"{what} x"), describe(weight, f"{what} weight")
    if values.dim() != 3 or weights.dim() != 2 or not weights.is_contiguous() or weights.shape[1] != taps * values.shape[2]:
        raise ValueError(
            f"{what}: expected x (B, N, K) and a contiguous weight (N, {'K' if taps == 1 else f'{taps}K'}), "
            f"stored shapes found are {tuple(values.shape)} and {tuple(weights.shape)}"
        )
    if epilogue.glu and weights.shape[0] % 2:
        raise ValueError(f"{what}: expected an even number of output channels for glu, found {weights.shape[0]}")
    columns = weights.shape[0] // (2 if epilogue.glu else 1)
    device, depth = values.device, _depth(values, a)
    finishing = _Finishing(epilogue, (*values.shape[:2], columns), output_dtype(x, epilogue), device, what)
    if config is None:
        swizzled = a.swizzled or b.swizzled
        count = values.shape[0] * values.shape[1]
        config = table.default_config(
            target(device), a.kind, columns, finishing.finish, tokens=finishing.tokens, swizzled=swizzled, rows=count
        )
    finishing.make_squares(config.squares_width)
    flat = rows(values, f"{what} x")
    if isinstance(x, Nvfp4Tensor) and x.layout == "rows" and flat.stride(0) != flat.shape[1]:
        raise ValueError(f"{what}: expected contiguous NVFP4 rows, whose scales are contiguous too, found strides {values.stride()}")
    variant = plans.gemm(a, b, columns, depth, finishing.tokens, finishing.finish, config, None if taps == 1 else taps * depth)
    first = weights[:, : values.shape[2]]
    arguments = {"a": flat, "a_row": flat.stride(0), "b": first, "M": flat.shape[0]} | _scales("a", x) | _scales("b", weight)
    launch(variant, arguments | finishing.arguments, **_programs(config, device))
    return finishing.result()


def temporal_conv(
    s: Operand,
    weight: Operand,
    frames: int,
    carried: Tensor | None = None,
    epilogue: Epilogue | None = None,
    *,
    config: plans.Config | None = None,
) -> Product:
    """See `naive.temporal_conv`; the epilogue may add, gate by frame, add the residual and quantize."""
    what, epilogue = "temporal_conv", epilogue or Epilogue()
    (a, values), (b, weights) = describe(s, f"{what} s"), describe(weight, f"{what} weight")
    B, tokens, stored = values.shape
    if tokens % frames:
        raise ValueError(f"{what}: expected {tokens} tokens in {frames} whole frames")
    if weights.dim() != 2 or not weights.is_contiguous() or weights.shape[1] != 3 * stored:
        raise ValueError(
            f"{what}: expected a contiguous weight of three taps for rows of {stored}, stored shape found is {tuple(weights.shape)}"
        )
    if (
        epilogue.bias is not None
        or epilogue.silu
        or epilogue.glu
        or epilogue.gate is not None
        or epilogue.extra is not None
        or epilogue.squares
    ):
        raise ValueError(f"{what}: expected an epilogue of add, frame_gate, residual and quantize only")
    if epilogue.frame_gate is not None and epilogue.frame_gate.shape[1] != frames:
        raise ValueError(f"{what}: expected {frames} frames in the gate, found {epilogue.frame_gate.shape[1]}")
    frame = tokens // frames
    flat = rows(values, f"{what} s")
    _aligned(flat, f"{what} s")
    arguments: dict[str, Any] = (
        {"a": flat, "a_row": flat.stride(0), "b": weights, "M": flat.shape[0]} | _scales("a", s) | _scales("b", weight)
    )
    finishing = _Finishing(epilogue, (B, tokens, weights.shape[0]), output_dtype(s, epilogue), values.device, what)
    depth = _depth(values, a)
    if config is None:
        config = table.default_config(target(values.device), a.kind, weights.shape[0], finishing.finish, tokens=frame, taps=3, batched=B > 1)
    if carried is not None:
        if carried.dtype != output_dtype(s, epilogue):
            raise ValueError(f"{what} carried: expected the output's dtype {output_dtype(s, epilogue)}, found {carried.dtype}")
        before = matching_rows(carried, (B, frame, weights.shape[0]), f"{what} carried")
        arguments |= {"carried": before, "carried_row": before.stride(0)}
    variant = plans.temporal_conv(a, b, weights.shape[0], depth, frame, tokens, carried is not None, finishing.finish, config)
    launch(variant, arguments | finishing.arguments, **_programs(config, values.device))
    return finishing.result()


def _aligned(x: Tensor, what: str) -> None:
    """ValueError where a row does not start at a multiple of 16 bytes, which the kernel takes for granted."""
    apart = x.stride(0) * x.element_size()
    if x.data_ptr() % 16 or apart % 16:
        raise ValueError(f"{what}: expected rows at multiples of 16 bytes, found an offset of {x.data_ptr() % 16} and rows {apart} bytes apart")


def apply(product: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Product:
    """See `naive.apply`: the epilogue on a product that another library made, in any dtype."""
    what = "epilogue"
    flat = rows(product, f"{what} product")
    columns = flat.shape[1] // (2 if epilogue.glu else 1)
    finishing = _Finishing(epilogue, (*product.shape[:-1], columns), dtype, product.device, what)
    variant = plans.epilogue(columns, finishing.tokens, type_name(product, f"{what} product"), finishing.finish)
    finishing.make_squares(variant.constexprs["BN"])
    launch(variant, {"product": flat, "product_row": flat.stride(0), "M": flat.shape[0]} | finishing.arguments)
    return finishing.result()

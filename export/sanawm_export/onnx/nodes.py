"""The project's own operations as ONNX nodes of domain `sanawm`, each with a function body of standard operators.

While a graph is traced, `GraphOps` stands in for the kernels: every call becomes one node and is recorded. The body of each node is then
exported from the plain definition of the same call, so a consumer without the fused kernels computes what the definition says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.gdn import naive
from sanawm_kernels.gdn.naive import Gates
from sanawm_kernels.rotary import ucpe

DOMAIN = "sanawm"
VERSION = 1


@dataclass(frozen=True)
class NodeCall:
    """A distinct use of an operation: the definition on flat tensors, and what it was called with."""

    name: str
    definition: Callable[..., tuple[Tensor, ...]] = field(compare=False)
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    attributes: tuple[tuple[str, Any], ...]


class GraphOps:
    """Implementation for `sanawm_kernels.ops.implementation` that emits nodes; `calls` collects them by operation name."""

    def __init__(self) -> None:
        self.calls: dict[str, NodeCall] = {}

    def _emit(self, name: str, definition: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], attributes: dict[str, Any]) -> Any:
        signature = tuple((tuple(t.shape), t.dtype) for t in tensors)
        call = NodeCall(name, definition, signature, tuple(attributes.items()))
        seen = self.calls.setdefault(name, call)
        if (seen.inputs, seen.attributes) != (call.inputs, call.attributes):
            raise ValueError(f"{name} is used with two signatures in one graph: {seen.inputs} and {call.inputs}")
        with torch.device("meta"):
            shapes = definition(*(torch.empty(s, dtype=d, device="meta") for s, d in signature))
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            tuple(tensors),
            attrs=attributes,
            dtypes=tuple(o.dtype for o in shapes),
            shapes=tuple(tuple(o.shape) for o in shapes),
            version=VERSION,
        )
        return outputs

    def main_gdn(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, conv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor,
        *, chunks: Sequence[int], key_scale: float, state: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """Node `MainGDN`; inputs in the order q, k, v, gates (4), conv, norms (2), tables (2), then s, z, tail when there is a state."""

        def definition(*t: Tensor) -> tuple[Tensor, ...]:
            past = (t[12], t[13], t[14]) if len(t) > 12 else None
            arguments: list[Any] = [*t[:3], Gates(*t[3:7]), *t[7:12]]
            return naive.main_gdn(*arguments, chunks=chunks, key_scale=key_scale, state=past)

        tensors = (q, k, v, *_flat(gates), conv, q_norm, k_norm, cos, sin, *(state or ()))
        return self._emit("MainGDN", definition, tensors, {"frames": _one(chunks), "key_scale": key_scale})

    def camera_gdn(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, conv: Tensor, q_norm: Tensor, k_norm: Tensor, rays: Tensor, rays_inverse: Tensor,
        cos: Tensor, sin: Tensor, *, chunks: Sequence[int], key_scale: float, clamp: bool = False, carry: bool = True,
        state: tuple[Tensor, Tensor | None] | None = None,
    ) -> Any:  # fmt: skip
        """Node `CameraGDN`; inputs as `MainGDN` with rays and rays_inverse before the tables, then s and (if carried) tail."""
        # A convolution without carried context has no tail to hand over.
        past_tensors = () if state is None else tuple(t for t in state if t is not None)

        def definition(*t: Tensor) -> tuple[Tensor, ...]:
            past: Any = None
            if len(t) > 14:
                past = (t[14], t[15] if carry else None)
            options: dict[str, Any] = {"chunks": chunks, "key_scale": key_scale, "clamp": clamp, "carry": carry}
            arguments: list[Any] = [*t[:3], Gates(*t[3:7]), *t[7:14]]
            return naive.camera_gdn(*arguments, state=past, **options)

        tensors = (q, k, v, *_flat(gates), conv, q_norm, k_norm, rays, rays_inverse, cos, sin, *past_tensors)
        attributes = {"frames": _one(chunks), "key_scale": key_scale, "clamp": int(clamp), "carry": int(carry)}
        return self._emit("CameraGDN", definition, tensors, attributes)

    def ucpe(self, x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Node `UCPE`."""
        return self._emit("UCPE", lambda *t: (ucpe(*t),), (x, matrix, cos, sin), {})[0]


def _flat(gates: Gates) -> tuple[Tensor, ...]:
    return tuple(getattr(gates, f.name) for f in dataclasses.fields(gates))


def _one(chunks: Sequence[int]) -> int:
    if len(chunks) != 1:
        raise ValueError(f"a graph holds one chunk, found {len(chunks)}; export each chunk kind as its own program")
    return chunks[0]

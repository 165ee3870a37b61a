"""Products of the same input merged into one, exactly.

A block's self-attention multiplies one tensor by seven weights: q, k and v, the camera branch's three, the output gate and the beta projection.
Stacking the rows of those with the same format gives one larger product and one quantization of the input.

Shapes: N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sanawm.model.dit import SanaWM
from sanawm_calibration.recipe import LayerFormat, LayerTable
from sanawm_calibration.roles import role_of

# GEMM libraries pick slow kernels for outputs that are no multiple of this.
ROW_MULTIPLE = 64
_SOURCE = "attention"


class Part(nn.Module):
    """Stands where a merged layer was and hands out its share of the merged product."""

    def __init__(self) -> None:
        super().__init__()
        self.drop()

    def hold(self, x: Tensor, output: Tensor) -> None:
        """Answer the next call with `output`, which was computed from `x`."""
        self._input: Tensor | None = x
        self._output: Tensor | None = output

    def drop(self) -> None:
        self._input = self._output = None

    def forward(self, x: Tensor) -> Tensor:
        if x is not self._input or self._output is None:
            raise RuntimeError("a merged layer was called with another input than its attention's")
        return self._output


def _stack(layers: list[nn.Linear]) -> tuple[nn.Linear, tuple[int, ...]]:
    """The merged layer and the sizes that its output splits into, the last one padding that nothing reads."""
    K = layers[0].in_features
    sizes = [layer.out_features for layer in layers]
    padding = -sum(sizes) % ROW_MULTIPLE
    first = layers[0].weight
    merged = nn.Linear(K, sum(sizes) + padding, bias=any(layer.bias is not None for layer in layers), device="meta")
    merged.weight = nn.Parameter(torch.cat([layer.weight for layer in layers] + [first.new_zeros(padding, K)]), requires_grad=False)
    if merged.bias is not None:
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        merged.bias = nn.Parameter(torch.cat([*biases, first.new_zeros(padding)]), requires_grad=False)
    return merged, (*sizes, padding)


def _attach(owner: nn.Module, position: int, sizes: tuple[int, ...], children: tuple[str, ...]) -> None:
    """Evaluate `owner.merged[position]` at the start of each call of `owner`, whose first argument is the input.

    The hooks find everything through the module they are called with, so that they serve copies of it too.
    """

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        merged: Any = module.merged
        for child, share in zip(children, merged[position](args[0]).split(sizes, -1)):
            part: Any = getattr(module, child)
            part.hold(args[0], share)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for child in children:
            part: Any = getattr(module, child)
            part.drop()

    owner.register_forward_pre_hook(begin)
    owner.register_forward_hook(end, always_call=True)


def merge_projections(model: SanaWM, table: Mapping[str, LayerFormat]) -> tuple[LayerTable, dict[str, tuple[str, ...]]]:
    """Merge, in place, the layers of each attention's input that have the same format in `table`; outputs stay the same.

    The model is linearized. Returns the table with the merged layers in place of their members, and the members of each merged layer, whose
    name is `blocks.<i>.attn.merged.<n>`.
    """
    merged_table = dict(table)
    members: dict[str, tuple[str, ...]] = {}
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}.attn"
        attention = block.attn
        groups: dict[LayerFormat, list[str]] = {}
        for child, module in attention.named_children():
            name = f"{prefix}.{child}"
            # Nothing calls the beta projection of softmax blocks.
            unused = child == "beta_proj" and model.config.is_softmax(index)
            if isinstance(module, nn.Linear) and not unused and role_of(name)[0].source == _SOURCE:
                groups.setdefault(table[name], []).append(child)
        attention.merged = nn.ModuleList()
        for layer_format, children in groups.items():
            if len(children) < 2:
                continue
            linear, sizes = _stack([getattr(attention, child) for child in children])
            _attach(attention, len(attention.merged), sizes, tuple(children))
            name = f"{prefix}.merged.{len(attention.merged)}"
            attention.merged.append(linear)
            for child in children:
                setattr(attention, child, Part())
                del merged_table[f"{prefix}.{child}"]
            merged_table[name] = layer_format
            members[name] = tuple(f"{prefix}.{child}" for child in children)
    return merged_table, members

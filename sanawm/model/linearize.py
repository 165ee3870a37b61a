"""Exact rewriting of the transformer's 1x1 and temporal convolutions into matrix multiplications."""

from __future__ import annotations

from torch import nn

from sanawm.model.dit import SanaWM
from sanawm.model.dit.ffn import TemporalConv
from sanawm.model.dit.layers import PointwiseConv


def _linear(module: PointwiseConv | TemporalConv) -> nn.Linear:
    weight = module.gemm_weight() if isinstance(module, TemporalConv) else module.weight.flatten(1)
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear


def linearize(model: SanaWM) -> SanaWM:
    """Replace every convolution that is a matrix multiplication by `nn.Linear`, in place; outputs are unchanged.

    Engines quantize and fuse matrix multiplications, and block formats along a convolution's spatial axis would be meaningless.
    """
    targets = [(name, m) for name, m in model.named_modules() if isinstance(m, (PointwiseConv, TemporalConv))]
    for name, module in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _linear(module))
    return model

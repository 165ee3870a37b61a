"""Products of a block's modulated input: queries, keys and values of both branches, the output gate, write strengths and decays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sanawm_export.cuda.context import Context
from sanawm_export.cuda.formats import GATES
from sanawm_export.cuda.products import Forms, product
from sanawm_export.cuda.tokens import modulate
from sanawm_export.cuda.weights import DiTWeights
from sanawm_runtime.engines._cuda_plan import View

_CAMERA = ("q_proj_cam", "k_proj_cam", "v_proj_cam")


@dataclass(frozen=True)
class Merged:
    """Slices of a block's merged products, in place, by layer: columns of (M, W)."""

    slices: Mapping[str, View]

    def part(self, index: int) -> View:
        """(M, C): 0..2 main q, k, v; 3..5 camera q, k, v; 6 output gate. Main q, k, v have one row stride, and so have the camera's."""
        if index < 3:
            qkv = self.slices["qkv"]
            return qkv.narrow(1, index * (qkv.shape[1] // 3), qkv.shape[1] // 3)
        return self.slices[(*_CAMERA, "output_gate")[index - 3]]

    @property
    def rows(self) -> int:
        return self.slices["qkv"].shape[0]

    @property
    def beta(self) -> View:
        """Logits of the tokens' write strengths, (M, H); only recurrent blocks have them."""
        return self.slices["beta_proj"]

    @property
    def decay(self) -> View:
        """What a frame's tokens add to the mean that is its decay logit, (M, H); rows as far apart as those of `beta`."""
        return self.slices["gate_proj"]


def project(ctx: Context, block: int, x: View, shift: View, scale: View) -> Merged:
    """Modulate the residual stream and multiply it by the weights that read it.

    There is one product for each format among the layers. Modulation writes the form of the first quantized one, and plain rows where something
    else needs them; each further form takes a launch.
    """
    weights, c = ctx.weights, ctx.config
    assert isinstance(weights, DiTWeights)
    groups = weights.merged(block)
    quantized = [name for name in groups if weights.formats.of(name).quant]
    lead = (quantized or list(groups))[0]
    forms = Forms(ctx, modulate(ctx, "modulate1", x, shift, scale, lead, keep=len(groups) > 1), lead)
    slices: dict[str, View] = {}
    for name, layers in groups.items():
        label = name.removeprefix(f"blocks.{block}.")
        done, column = product(ctx, label, name, forms.of(label, name)).values, 0
        for layer in layers:
            width = {"qkv": 3 * c.hidden, **dict.fromkeys(GATES, c.heads)}.get(layer, c.hidden)
            slices[layer] = done.narrow(1, column, width)
            column += width
    return Merged(slices)

"""The `text_encoder` program as launches: Gemma-2 from token ids to the embedding that the transformer attends to.

Shapes: L tokens of the padded prompt, K text tokens that the transformer sees, C hidden width, H query heads, J key heads, D head width.
"""

from __future__ import annotations

import math

import numpy as np

from sanawm.bfloat16 import round_to
from sanawm.config import TextConfig
from sanawm.errors import UserError
from sanawm.programs import Program
from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.products import product
from sanawm_export.cuda.tape import Lowered, Tape, row_stride
from sanawm_export.cuda.text_weights import TextWeights
from sanawm_kernels.text import plans
from sanawm_runtime.engines._cuda_plan import View


def lower_text(program: Program, weights: TextWeights, target: int) -> Lowered:
    """Token ids and mask to the embedding and mask of the selected tokens, for compute capability `target`.

    Raises UserError for prompts longer than the window of Gemma's local layers, which this plan does not apply.
    """
    L = program.input("input_ids").shape[1]
    if L > plans.WINDOW:
        raise UserError(f"the cuda engine encodes prompts of up to {plans.WINDOW} tokens, found {L}; shorten the prompt prefix")
    return _TextEncoder(program, weights, target).lower()


class _TextEncoder:
    def __init__(self, program: Program, weights: TextWeights, target: int) -> None:
        self.tape = Tape(program)
        self.ctx = Context(self.tape, weights, target)
        self.config: TextConfig = weights.config
        L = program.input("input_ids").shape[1]
        self.ids, self.mask = (self.tape.input(name).reshape(L) for name in ("input_ids", "attention_mask"))

    def lower(self) -> Lowered:
        ctx, tape, c = self.ctx, self.tape, self.config
        L, C = self.ids.shape[0], c.hidden
        text_mask = tape.output("text_mask")
        K = text_mask.shape[1]
        tape.launch("mask", plans.token_mask(), {"mask": self.mask, "out": text_mask, "L": L, "K": K}, ("out",))
        x, u = ctx.tensor("embedding", L, C), ctx.tensor("embedding.normed", L, C)
        bindings = {"ids": self.ids, "table": ctx.weight("embed"), "gain": ctx.weight("blocks.0.input"), "updated": x, "out": u}
        # The model holds the root of the width in its own dtype.
        scale = float(round_to(np.full(1, math.sqrt(C), np.float32), ctx.dtype)[0])
        variant = plans.embed_rows(ctx.kind, C)
        tape.launch("embed", variant, {**bindings, "scale": scale}, ("updated", "out"), gathered=("table",), ROWS=L)
        for i in range(c.layers):
            name = f"blocks.{i}"
            attended = product(ctx, f"{name}.out", f"{name}.out", Rows(self._attention(name, u))).values
            x, u = self._joined(f"{name}.attention.norm", x, attended, f"{name}.post_attention", f"{name}.pre_feedforward")
            down = self._feed_forward(name, u)
            if i + 1 < c.layers:
                x, u = self._joined(f"{name}.ffn.norm", x, down, f"{name}.post_feedforward", f"blocks.{i + 1}.input")
        self._selected(x, down, f"blocks.{c.layers - 1}.post_feedforward", tape.output("text").reshape(K, C))
        return tape.finish()

    def _attention(self, name: str, u: View) -> View:
        ctx, tape, c = self.ctx, self.tape, self.config
        L, H, J, D = u.shape[0], c.heads, c.kv_heads, c.head_dim
        qkv = product(ctx, f"{name}.qkv", f"{name}.qkv", Rows(u)).values
        turned = ctx.tensor(f"{name}.rope", L, (H + J) * D)
        bindings = {"x": qkv, "x_row": row_stride(qkv), "frequencies": ctx.weight("frequencies"), "out": turned, "L": L}
        tape.launch(f"{name}.rope", plans.rotate_halves(ctx.kind, H + J, D), bindings, ("out",))
        q, k, v = turned.narrow(1, 0, H * D), turned.narrow(1, H * D, J * D), qkv.narrow(1, (H + J) * D, J * D)
        out = ctx.tensor(f"{name}.attend", L, H * D)
        operands = {"q": q, "q_row": row_stride(q), "k": k, "k_row": row_stride(k), "v": v, "v_row": row_stride(v)}
        scale = c.query_pre_attn_scalar**-0.5
        variant = plans.causal_attention(ctx.kind, ctx.target, H, J, D)
        # Half of the square is above the diagonal.
        flops = 2 * L * (L + 1) * H * D
        bound = {**operands, "mask": self.mask, "out": out, "L": L, "softmax_scale": scale}
        tape.launch(f"{name}.attend", variant, bound, ("out",), flops=flops, unit=ctx.kind)
        return out

    def _feed_forward(self, name: str, u: View) -> View:
        ctx, G = self.ctx, self.config.intermediate
        both = product(ctx, f"{name}.gate_up", f"{name}.gate_up", Rows(u)).values
        gated = ctx.tensor(f"{name}.gelu", u.shape[0], G)
        size = u.shape[0] * G
        self.tape.launch(f"{name}.gelu", plans.gelu_gated(ctx.kind, G), {"x": both, "out": gated, "SIZE": size}, ("out",))
        return product(ctx, f"{name}.down", f"{name}.down", Rows(gated)).values

    def _joined(self, label: str, x: View, branch: View, post: str, pre: str) -> tuple[View, View]:
        """The residual stream after a sub-block, and its norm for the next one."""
        ctx, (L, C) = self.ctx, x.shape
        stream, out = ctx.tensor(f"{label}.stream", L, C), ctx.tensor(label, L, C)
        bindings = {"x": x, "branch": branch, "post": ctx.weight(post), "pre": ctx.weight(pre), "updated": stream, "out": out}
        self.tape.launch(label, plans.add_normed(ctx.kind, C, True), bindings, ("updated", "out"), ROWS=L)
        return stream, out

    def _selected(self, x: View, branch: View, post: str, text: View) -> None:
        """The last sub-block's end and the final norm, of the first position and the last K - 1 alone."""
        ctx, (L, C), K = self.ctx, x.shape, text.shape[0]
        variant = plans.add_normed(ctx.kind, C, False)
        for label, source, target, count in (("norm.first", 0, 0, 1), ("norm.rest", L - K + 1, 1, K - 1)):
            if not count:
                continue
            rows = {"x": x.narrow(0, source, count), "branch": branch.narrow(0, source, count), "out": text.narrow(0, target, count)}
            self.tape.launch(label, variant, {**rows, "post": ctx.weight(post), "pre": ctx.weight("norm")}, ("out",), ROWS=count)

"""The `camera` and `prompt_kv` programs as launches: what a chunk or a prompt needs once."""

from __future__ import annotations

from sanawm.errors import UserError
from sanawm.programs import Program
from sanawm_export.cuda.attention import CROSS_NORM_EPS
from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.dit import tokens_of
from sanawm_export.cuda.products import Forms, product
from sanawm_export.cuda.tape import Lowered, Tape
from sanawm_export.cuda.tokens import rms_norm
from sanawm_export.cuda.weights import DiTWeights
from sanawm_kernels.chunk import plans as chunk

CAPTION_NORM_EPS = 1e-5


def lower_camera(program: Program, weights: DiTWeights, target: int) -> Lowered:
    """A chunk's poses and Plücker maps to ray matrices, rotary tables and every block's Plücker product."""
    tape = Tape(program)
    ctx, c = Context(tape, weights, target), weights.config
    if c.ray_dtype != "float32":
        raise UserError(f"the cuda engine computes ray matrices in float32, and this model asks for {c.ray_dtype}; set ray_dtype to float32")
    conditions, maps = tape.input("camera_conditions"), tape.input("chunk_plucker")
    T = conditions.shape[1]
    M = T * c.tokens_per_frame
    bindings = {"camera": conditions, "rays": tape.output("rays"), "inverse": tape.output("rays_inverse")}
    tape.launch("rays", chunk.ray_matrices(c.height, c.width), bindings, ("rays", "inverse"), FRAMES=T)
    for prefix, keep in (("", c.rope_pairs), ("cam_", c.camera_rope_pairs)):
        for part in ("cos", "sin"):
            tables = {"time": tape.input(f"time_{part}"), "rows": ctx.weight(f"rope.row_{part}"), "columns": ctx.weight(f"rope.column_{part}")}
            variant = chunk.rope_table(c.height, c.width, c.rope_pairs, keep)
            tape.launch(f"{prefix}{part}", variant, {**tables, "out": tape.output(f"{prefix}{part}"), "N": M}, ("out",))
    tokens = tokens_of(ctx, "plucker.tokens", maps)
    composed = [weights.composes_plucker(i) for i in range(c.depth)]
    embedded = None if all(composed) else Forms(ctx, product(ctx, "plucker", "plucker_embedder", tokens))
    for i in range(c.depth):
        label, name = f"plucker.{i}", f"blocks.{i}.plucker"
        x = tokens if embedded is None or composed[i] else embedded.of(label, name)
        product(ctx, label, name, x, out=tape.output(label).reshape(M, c.hidden))
    return tape.finish()


def lower_prompt_kv(program: Program, weights: DiTWeights, target: int) -> Lowered:
    """Text embedding to every block's cross-attention keys (normalised) and values."""
    tape = Tape(program)
    ctx, c = Context(tape, weights, target), weights.config
    L, C = c.text_tokens, c.hidden
    inner = product(ctx, "fc1", "caption.fc1", Rows(tape.input("text").reshape(L, c.caption_channels))).values
    active = ctx.tensor("gelu", L, C)
    tape.launch("gelu", chunk.gelu(ctx.kind), {"x": inner, "out": active, "SIZE": L * C}, ("out",))
    caption = product(ctx, "fc2", "caption.fc2", Rows(active)).values
    forms = Forms(ctx, Rows(rms_norm(ctx, "norm", caption, ctx.weight("caption.norm"), CAPTION_NORM_EPS)))
    for i in range(c.depth):
        name = f"blocks.{i}"
        y = forms.of(f"{name}.text", f"{name}.cross_kv")
        k = product(ctx, f"{name}.k", f"{name}.cross_kv", y, rows_of=slice(0, C)).values
        rms_norm(ctx, f"{name}.k_norm", k, ctx.weight(f"{name}.cross_k_norm"), CROSS_NORM_EPS, out=tape.output(f"keys.{i}").reshape(L, C))
        product(ctx, f"{name}.v", f"{name}.cross_kv", y, rows_of=slice(C, 2 * C), out=tape.output(f"values.{i}").reshape(L, C))
    return tape.finish()

"""The transformer's `denoise_*` and `commit_*` programs as launches.

Shapes: T frames, S tokens a frame, M = T*S tokens, C channels, G width of the gated half.
"""

from __future__ import annotations

from dataclasses import dataclass

from sanawm.programs import Program
from sanawm_export.cuda.attention import Past, cross_attention, gdn_attention, softmax_attention
from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.products import as_operand, product, temporal_product
from sanawm_export.cuda.projections import project
from sanawm_export.cuda.tape import Lowered, Tape, row_stride
from sanawm_export.cuda.tokens import depthwise_glu, modulate
from sanawm_export.cuda.weights import DiTWeights, modulation_width
from sanawm_kernels.chunk import plans as chunk
from sanawm_runtime.engines._cuda_plan import TRITON_TYPES, View

_CAMERA = ("rays", "rays_inverse", "cos", "sin", "cam_cos", "cam_sin")


@dataclass(frozen=True)
class Modulation:
    """AdaLN rows of every frame, (T, 6C a block and 2C), in the activations' dtype: computed in float64 at build time and rounded once."""

    rows: View
    hidden: int

    def part(self, index: int) -> View:
        """(T, C): 6 * block + 0..5 are shift, scale and gate of the attention, then of the FFN; the last two the final layer's shift and scale."""
        return self.rows.narrow(1, index * self.hidden, self.hidden)


def lower_dit(program: Program, weights: DiTWeights, target: int) -> Lowered:
    """`denoise_*` (velocity) or `commit_*` (new state, at t = 0) of a chunk kind for compute capability `target`."""
    tape = Tape(program)
    ctx = Context(tape, weights, target)
    c = weights.config
    latents = tape.input("latents")
    T, commit = latents.shape[2], program.outputs[0].name != "velocity"
    camera = {name: tape.input(name) for name in _CAMERA}
    modulation = Modulation(_modulation_rows(ctx, T, commit), c.hidden)
    x = _embed(ctx, latents)
    mask = tape.input("text_mask")
    for i in range(c.depth):
        with tape.scope(f"blocks.{i}"):
            past = _past(tape, i)
            new = _new_state(tape, i) if commit else None
            text = (tape.input(f"keys.{i}"), tape.input(f"values.{i}"), mask)
            x = _block(ctx, i, x, T, modulation, camera, text, past, new, last=commit and i == c.depth - 1)
    if not commit:
        u = modulate(ctx, "final.modulate", x, modulation.part(6 * c.depth), modulation.part(6 * c.depth + 1), "final")
        _transpose(ctx, "velocity", product(ctx, "final", "final", u).values, tape.output("velocity").reshape(c.in_channels, x.shape[0]))
    return tape.finish()


def _modulation_rows(ctx: Context, frames: int, commit: bool) -> View:
    table = ctx.weight("modulation")
    if commit:  # the last timestep of the table is 0, for every frame
        return table.narrow(0, table.shape[0] - 1, 1).repeat_rows(frames)
    width = modulation_width(ctx.config)
    rows = ctx.tensor("modulation", frames, width)
    bindings = {"timestep": ctx.tape.input("timestep"), "steps": ctx.weight("timesteps"), "table": table, "out": rows, "WIDTH": width}
    ctx.tape.launch("modulation", chunk.modulation_rows(ctx.kind, table.shape[0]), bindings, ("out",), FRAMES=frames)
    return rows


def _transpose(ctx: Context, label: str, x: View, out: View) -> View:
    """(R, C) to (C, R) in out's dtype."""
    variant = chunk.transpose(TRITON_TYPES[x.dtype], TRITON_TYPES[out.dtype])
    ctx.tape.launch(label, variant, {"x": x, "x_row": row_stride(x), "out": out, "R": x.shape[0], "C": x.shape[1]}, ("out",))
    return out


def tokens_of(ctx: Context, label: str, maps: View) -> Rows:
    """Channel-major maps (1, K, T, h, w) as tokens (M, K)."""
    K = maps.shape[1]
    M = maps.shape[2] * maps.shape[3] * maps.shape[4]
    return Rows(_transpose(ctx, label, maps.reshape(K, M), ctx.tensor(label, M, K)))


def _embed(ctx: Context, latents: View) -> View:
    return product(ctx, "embed", "x_embedder", tokens_of(ctx, "embed.tokens", latents)).values


def _past(tape: Tape, block: int) -> Past:
    """State inputs of a block, oldest first; entries that a block does not read are left out."""
    chunks = []
    for prefix in ("sink", "past"):
        start = f"{prefix}.{block}."
        fields = {spec.name.removeprefix(start): spec.name for spec in tape.program.inputs if spec.name.startswith(start)}
        if fields:
            chunks.append({field: tape.input(name) for field, name in fields.items()})
    return Past(tuple(chunks))


def _new_state(tape: Tape, block: int) -> dict[str, View]:
    """State outputs of a block by field."""
    names = [spec.name for spec in tape.program.outputs if spec.name.startswith(f"next.{block}.")]
    return {name.rsplit(".", 1)[1]: tape.output(name) for name in names}


def _block(
    ctx: Context, i: int, x: View, T: int, modulation: Modulation, camera: dict[str, View], text: tuple[View, View, View], past: Past,
    new: dict[str, View] | None, last: bool,
) -> View:  # fmt: skip
    """One block on the residual stream x (M, C).

    In the clean pass nothing reads the last block's output but the next chunk, which needs what its last frame carries on: after attention's keys,
    values and states the block is computed for that frame alone, up to its temporal convolution.
    """
    c, name = ctx.config, f"blocks.{i}"
    S, M = c.tokens_per_frame, x.shape[0]
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation.part(6 * i + j) for j in range(6))
    merged = project(ctx, i, x, shift1, scale1)
    wanted = S if last else M
    if c.is_softmax(i):
        main, cam = softmax_attention(ctx, name, merged, camera, past, new, wanted)
    else:
        main, cam = gdn_attention(ctx, name, merged, camera, T, past, new)
        main, cam = main.last(wanted), cam.last(wanted)
    x, gate = x.last(wanted), merged.part(6).last(wanted)
    plucker = ctx.tape.input(f"plucker.{i}").reshape(M, c.hidden).last(wanted)
    gate1, shift2, scale2 = (rows.last(wanted // S) for rows in (gate1, shift2, scale2))
    gated = product(ctx, "out_cam", f"{name}.out_cam", cam, add=main, gate=gate, quantize_for=f"{name}.proj", keep=False)
    stream = product(
        ctx, "proj", f"{name}.proj", gated, frame_gate=gate1, tokens=S, residual=x, extra=plucker, quantize_for=f"{name}.cross_q"
    )
    attended = cross_attention(ctx, name, stream, *text)
    x = product(ctx, "cross.proj", f"{name}.cross_proj", attended, residual=stream.values).values
    u = modulate(ctx, "modulate2", x, shift2, scale2, f"{name}.inverted")
    inner = product(ctx, "inverted", f"{name}.inverted", u, silu=True).values
    mixed = depthwise_glu(ctx, "depthwise", inner, name, wanted // S, f"{name}.point")
    spatial = product(ctx, "point", f"{name}.point", mixed, quantize_for=f"{name}.temporal")
    shifted = as_operand(ctx, "temporal", spatial, f"{name}.temporal")
    if new is not None:
        # The next chunk adds what its first frame gets from this last one: a product that is the same in all of its steps.
        product(ctx, "carried", f"{name}.temporal", shifted.last(S), taps=3, out=new["ffn_tail"].reshape(S, c.hidden))
    if last:
        return spatial.values
    carried = past.last["ffn_tail"].reshape(S, c.hidden) if past.last else None
    return temporal_product(ctx, "temporal", f"{name}.temporal", shifted, carried, S, add=spatial.values, frame_gate=gate2, residual=x)

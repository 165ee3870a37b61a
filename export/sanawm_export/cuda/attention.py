"""Self-attention of both block kinds and cross-attention on the tape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sanawm_export.cuda.context import Context, Rows
from sanawm_export.cuda.products import parts_of_squares, product, tile_quantization
from sanawm_export.cuda.projections import Merged
from sanawm_export.cuda.tape import row_stride
from sanawm_kernels.attention import plans
from sanawm_kernels.attention.table import pair_tile, paired, tile
from sanawm_kernels.gdn import plans as gdn
from sanawm_kernels.gdn.workspace import scratch
from sanawm_kernels.gemm.table import MULTIPROCESSORS
from sanawm_kernels.tokenwise import block_plans
from sanawm_runtime.engines._cuda_plan import View

NORM_EPS = gdn.NORM_EPS
CROSS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Past:
    """State that a chunk reads in one block, by field, oldest first: empty, one chunk's, or the sink's attention fields and the last chunk's."""

    chunks: tuple[dict[str, View], ...] = ()

    @property
    def last(self) -> dict[str, View] | None:
        return self.chunks[-1] if self.chunks else None


def gdn_attention(
    ctx: Context, block: str, merged: Merged, camera: dict[str, View], frames: int, past: Past, new: dict[str, View] | None
) -> tuple[View, Rows]:
    """Both branches of a gated delta network in four launches, (main, camera) (M, C) each; with `new` its state is written."""
    c, tape = ctx.config, ctx.tape
    M, C = merged.rows, c.hidden
    precision = "bf16" if ctx.kind == "bf16" else "ieee"
    problem = gdn.Problem(
        1, c.heads, c.head_dim, frames, c.tokens_per_frame, c.key_scale, kind=ctx.kind, weight_kind=ctx.kind, gate_kind=ctx.kind, precision=precision,
        has_state=past.last is not None, commit=new is not None, clamp=c.rms_clamp, camera_carry=c.camera_conv_tail,
    )  # fmt: skip
    settings = gdn.row(problem, "summarize", ctx.target).settings
    bindings: dict[str, Any] = {
        "A_log": ctx.weight(f"{block}.A_log"), "dt_bias": ctx.weight(f"{block}.dt_bias"),
        "rays": camera["rays"], "rays_inverse": camera["rays_inverse"], "rays_batch": 0,
        "cos": camera["cos"], "sin": camera["sin"], "camera_cos": camera["cam_cos"], "camera_sin": camera["cam_sin"],
    }  # fmt: skip
    for name, logits in (("beta", merged.beta), ("decay", merged.decay)):
        bindings |= {name: logits, f"{name}_row": row_stride(logits), f"{name}_batch": M * row_stride(logits)}
    bindings |= _gdn_state(past.last, new)
    writes = {name for name in bindings if name.endswith("_out")}
    with tape.group():
        shapes = scratch(1, c.heads, frames, c.tokens_per_frame, c.head_dim, precision, settings)
        needed = set().union(*(variant.signature for variant in gdn.plan(problem, ctx.target)))
        bindings |= {name: ctx.tensor(f"gdn.{name}", *shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if name in needed}
        outputs = {}
        for branch, first, suffix in (("main", 0, ""), ("camera", 3, "_cam")):
            q, k, v = (merged.part(first + i) for i in range(3))
            outputs[branch] = out = ctx.tensor(branch, M, C)
            bindings |= {f"{branch}_{n}": view for n, view in (("q", q), ("k", k), ("v", v), ("out", out))}
            bindings |= {f"{branch}_row": row_stride(q), f"{branch}_batch": M * row_stride(q)}
            bindings |= {f"{branch}_out_row": row_stride(out), f"{branch}_out_batch": M * row_stride(out)}
            bindings |= {f"{branch}_conv": ctx.weight(f"{block}.conv_k{suffix}")}
            bindings |= {f"{branch}_{n}": ctx.weight(f"{block}.{n}{suffix}") for n in ("q_norm", "k_norm")}
        writes |= {"main_out", "camera_out"}
        D, H = c.head_dim, c.heads
        # Multiplications and additions of the two phases with products (main, camera and normaliser; states to queries).
        work = {"summarize": 2 * 5 * M * H * D * D, "combine": 2 * 7 * frames * H * D**3, "apply": 2 * 2 * M * H * D * D}
        for variant, phase in zip(gdn.plan(problem, ctx.target), ("prepare", "summarize", "combine", "apply")):
            written = writes | set(_WRITTEN[phase])
            unit = "tf32" if phase == "combine" and ctx.kind == "bf16" else ctx.kind
            tape.launch(f"gdn.{phase}", variant, bindings, written, flops=work.get(phase, 0), unit=unit)
    return outputs["main"], Rows(outputs["camera"])


# Scratch tensors that each phase fills.
_WRITTEN = {
    "prepare": ("main_keys", "plain_keys", "camera_keys", "camera_values", "growth", "q_scale"),
    "summarize": ("gram", "update", "column", "inflation", "decay_sums"),
    "combine": ("applied", "applied_scale", "applied_z"),
    "apply": (),
}


def _gdn_state(old: dict[str, View] | None, new: dict[str, View] | None) -> dict[str, Any]:
    fields = {"main_state": "s", "z": "z", "camera_state": "s_cam", "main_tail": "k_tail", "camera_tail": "cam_tail"}
    bindings: dict[str, Any] = {}
    if new is not None:
        bindings |= {f"{name}_out": new[field] for name, field in fields.items()}
    if old is not None:
        bindings |= {f"{name}_in": old[field] for name, field in fields.items()}
    return bindings


def softmax_attention(
    ctx: Context, block: str, merged: Merged, camera: dict[str, View], past: Past, new: dict[str, View] | None, wanted: int
) -> tuple[View, Rows]:
    """Both branches of softmax attention of the last `wanted` tokens over the window, (main, camera) (wanted, C) each.

    Keys and values of a committed chunk go to `new`. The camera branch is quantized for its output projection where a tile can do that.
    """
    c, tape = ctx.config, ctx.tape
    M, H, D = merged.rows, c.heads, c.head_dim
    kept = new or {}

    def heads(name: str) -> View:
        target = kept.get(name)
        return ctx.tensor(name, M, H * D) if target is None else target.reshape(M, H * D)

    q, k, v = (merged.part(i) for i in range(3))
    turned = {"q": ctx.tensor("q", M, H * D), "k": heads("k")}
    norms = {n: ctx.weight(f"{block}.{n}") for n in ("q_norm", "k_norm")}
    bindings: dict[str, Any] = {
        "q": q, "q_row": row_stride(q), "k": k, "k_row": row_stride(k), **norms, "cos": camera["cos"], "sin": camera["sin"],
        "q_out": turned["q"], "k_out": turned["k"], "ROWS": M,
    }  # fmt: skip
    tape.launch("rope", block_plans.rope_heads(ctx.kind, ctx.kind, H, D, M, NORM_EPS), bindings, ("q_out", "k_out"))
    if new is not None:
        tape.copy("values", v, kept["v"].reshape(M, H * D))
    cam_q, cam_k, cam_v = (merged.part(i) for i in range(3, 6))
    turned |= {"cam_q": ctx.tensor("cam_q", M, H * D), "cam_k": heads("cam_k"), "cam_v": heads("cam_v")}
    norms = {n: ctx.weight(f"{block}.{n}_cam") for n in ("q_norm", "k_norm")}
    bindings = {
        "q": cam_q, "q_row": row_stride(cam_q), "k": cam_k, "k_row": row_stride(cam_k), "v": cam_v, "v_row": row_stride(cam_v), **norms,
        "rays": camera["rays"], "rays_inverse": camera["rays_inverse"], "cos": camera["cam_cos"], "sin": camera["cam_sin"],
        "q_out": turned["cam_q"], "k_out": turned["cam_k"], "v_out": turned["cam_v"], "ROWS": M,
    }  # fmt: skip
    variant = block_plans.ucpe_heads(ctx.kind, ctx.kind, H, D, M, M, NORM_EPS, c.rms_clamp)
    tape.launch("ucpe", variant, bindings, ("q_out", "k_out", "v_out"))
    windows = [(p["k"], p["v"]) for p in past.chunks] + [(turned["k"], v)]
    cam_windows = [(p["cam_k"], p["cam_v"]) for p in past.chunks] + [(turned["cam_k"], turned["cam_v"])]
    q, cam_q = turned["q"].last(wanted), turned["cam_q"].last(wanted)
    camera = {name: camera[name].last(wanted, axis) for name, axis in (("rays", 1), ("cam_cos", 0), ("cam_sin", 0))}
    if paired(ctx.target, ctx.kind):
        return _pair(ctx, q, windows, cam_q, cam_windows, camera, f"{block}.out_cam")
    main = _window(ctx, "main", q, windows, c.main_scale).values
    return main, _window(ctx, "camera", cam_q, cam_windows, c.camera_scale, camera, f"{block}.out_cam")


def _pair(
    ctx: Context, q: View, windows: list[tuple[View, View]], cam_q: View, cam_windows: list[tuple[View, View]], camera: dict[str, View], product: str
) -> tuple[View, Rows]:
    """Both branches together, in two launches; the camera's output is quantized for `product` where a tile can do that."""
    c = ctx.config
    M, H, D = q.shape[0], c.heads, c.head_dim
    chosen, programs = pair_tile(ctx.target), MULTIPROCESSORS[ctx.target] // 2
    main = ctx.tensor("main", M, H * D)
    done, out, fill, parameters = _outputs(ctx, "camera", M, H, D, product)
    bindings: dict[str, Any] = {
        "N": M, "programs": programs, "main_scale": c.main_scale, "camera_scale": c.camera_scale, "main_out": main, "camera_out": out,
        "rays": camera["rays"], "cos": camera["cam_cos"], "sin": camera["cam_sin"], **fill,
        **_addressed("main_q", q, H), **_addressed("camera_q", cam_q, H),
    }  # fmt: skip
    keys = 0
    for branch, segments in (("main", windows), ("camera", cam_windows)):
        for i, pair in enumerate(segments):
            for name, x in zip("kv", pair):
                x = _rows(x, H * D)
                bindings |= _addressed(f"{branch}_{name}{i}", x, H) | {f"n{i}": x.shape[0]}
            keys += bindings[f"n{i}"]
    left = plans.pair_scratch(M, H, D, chosen, programs)
    with ctx.tape.group():
        bindings |= {name: ctx.tensor(f"attend.{name}", *shape, dtype=dtype) for name, (shape, dtype) in left.items()}
        variant = plans.window_pair(H, D, len(windows), chosen)
        ctx.tape.launch("attend", variant, bindings, ("main_out", *left), flops=4 * M * keys * H * D, unit=ctx.kind)
        finish = plans.finish_pair(H, D, len(windows), chosen, keep=out is not None, **parameters)
        ctx.tape.launch("attend.finish", finish, bindings, ("main_out", "camera_out", "codes", "scales"))
    return main, replace(done, plain=out)


def _addressed(name: str, x: View, heads: int) -> dict[str, Any]:
    """Rows (n, C) as (n, H, D) for the launch that reads them, and for the one that rarely does their address alone, which costs it no traffic."""
    return {name: _by_head(x, heads), f"{name}_at": x.narrow(0, 0, 1), f"{name}_row": row_stride(x)}


def _by_head(x: View, heads: int) -> View:
    """Rows (n, C) as (n, H, D)."""
    width = x.shape[1] // heads
    return replace(x, shape=(x.shape[0], heads, width), strides=(row_stride(x), width, 1))


def _rows(x: View, columns: int) -> View:
    """Cached heads (1, n, H, D), or rows as they are, as rows."""
    return x.reshape(x.shape[1], columns) if len(x.shape) == 4 else x


def _window(
    ctx: Context, label: str, q: View, segments: list[tuple[View, View]], scale: float, ucpe: dict[str, View] | None = None,
    quantize_for: str | None = None,
) -> Rows:  # fmt: skip
    c = ctx.config
    M, H, D = q.shape[0], c.heads, c.head_dim
    done, out, fill, parameters = _outputs(ctx, label, M, H, D, quantize_for)
    chosen = tile("window", ctx.target, ctx.kind)
    variant = plans.window_attention(ctx.kind, H, D, len(segments), chosen, ucpe=ucpe is not None, keep=out is not None, **parameters)
    bindings: dict[str, Any] = {"q": q, "q_row": row_stride(q), "q_batch": M * row_stride(q), "out": out, "N": M, "softmax_scale": scale, **fill}
    keys = 0
    for i, (k, v) in enumerate(segments):
        k, v = _rows(k, H * D), _rows(v, H * D)
        n = k.shape[0]
        bindings |= {f"k{i}": k, f"k{i}_row": row_stride(k), f"k{i}_batch": n * row_stride(k)}
        bindings |= {f"v{i}": v, f"v{i}_row": row_stride(v), f"v{i}_batch": n * row_stride(v), f"n{i}": n}
        keys += n
    if ucpe is not None:
        bindings |= {"rays": ucpe["rays"], "cos": ucpe["cam_cos"], "sin": ucpe["cam_sin"]}
    ctx.tape.launch(f"{label}.attend", variant, bindings, _STORED, flops=4 * M * keys * H * D, unit=ctx.kind, BATCH=1)
    return replace(done, plain=out)


_STORED = ("out", "codes", "scales")


def _outputs(
    ctx: Context, label: str, M: int, heads: int, width: int, quantize_for: str | None
) -> tuple[Rows, View | None, dict[str, Any], dict[str, Any]]:
    """What an attention kernel stores: quantized rows where its programs, a head each, can make them, else plain ones."""
    nvfp4 = quantize_for is not None and ctx.weights.formats.of(quantize_for).quant == "nvfp4"
    # Heads of another width do not end with a block of 16.
    named = None if nvfp4 and width % 16 else quantize_for
    done, fill, parameters = tile_quantization(ctx, label, M, heads * width, named)
    return done, ctx.tensor(label, M, heads * width) if done.quant is None else None, fill, parameters


def cross_attention(ctx: Context, block: str, x: Rows, keys: View, values: View, mask: View) -> Rows:
    """Attention of the residual stream to the caption, (M, C), in the form that its output projection takes where a tile can make it."""
    c = ctx.config
    H, D = c.cross_heads, c.hidden // c.cross_heads
    M, L = (x.plain or x.codes).shape[0], mask.shape[1]  # type: ignore[union-attr]
    parts = parts_of_squares(ctx, f"{block}.cross_q", c.hidden)
    squares = ctx.tensor("cross.squares", M, parts, dtype="float32")
    q = product(ctx, "cross.q", f"{block}.cross_q", x, squares=squares).values
    k, v = (t.reshape(L, H * D) for t in (keys, values))
    done, out, fill, parameters = _outputs(ctx, "cross.attend", M, H, D, f"{block}.cross_proj")
    tensors = {"q": q, "k": k, "v": v}
    if plans.roles_fit(ctx.target, ctx.kind, D, L, parts, parameters.get("quant"), 1):
        variant = plans.cross_roles(ctx.kind, H, D, L, CROSS_NORM_EPS, parts)
        tensors = {name: _by_head(x, H) for name, x in tensors.items()}
    else:
        chosen = tile("cross", ctx.target, ctx.kind, parameters.get("quant"))
        variant = plans.cross_attention(ctx.kind, ctx.kind, H, D, CROSS_NORM_EPS, chosen, parts=parts, keep=out is not None, **parameters)
    bindings: dict[str, Any] = {
        **tensors, "q_row": row_stride(q), "q_batch": M * row_stride(q), "k_row": row_stride(k), "k_batch": L * row_stride(k),
        "v_row": row_stride(v), "v_batch": L * row_stride(v), "mask": mask, "q_norm": ctx.weight(f"{block}.cross_q_norm"),
        "squares": squares, "out": out, "N": M, "L": L, "softmax_scale": D**-0.5, **fill,
    }  # fmt: skip
    programs = MULTIPROCESSORS.get(ctx.target, 1)
    ctx.tape.launch("cross.attend", variant, bindings, _STORED, flops=4 * M * L * c.hidden, unit=ctx.kind, BATCH=1, SMS=programs)
    return replace(done, plain=out)

"""Expected names and shapes of every checkpoint tensor, computed from the configuration.

Names are the official ones (NVlabs/Sana); diffusers differs in one prefix. Source of the layout: SANA-WM, arXiv 2605.15178, and its public
implementations; of the VAE: LTX-2 in diffusers; of the text encoder: Gemma-2 in transformers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from sanawm.config import DiTConfig, TextConfig, VAEConfig
from sanawm.errors import CheckpointError, UserError

Shape = tuple[int, ...]

TIME_FREQUENCIES = 256
RAYMAP_CHANNELS = 3
FRAME_TAPS = 3  # temporal convolution of the feed-forward network
# Stored by the official code and read by nothing; their shape is not checked either.
IGNORED = ("pos_embed", "y_embedder.y_embedding")

_TO_DIFFUSERS = (("t_embedder.mlp.0.", "t_embedder.linear_1."), ("t_embedder.mlp.2.", "t_embedder.linear_2."))
# Tensors that every stage-1 checkpoint has once; what stands before the first one found is the file's prefix.
_ANCHORS = ("x_embedder.proj.weight", "t_block.1.weight", "final_layer.linear.weight")
_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a checkpoint is expected to hold.

    `group` is the part of the model it belongs to. `used` is false for tensors that no forward pass reads. A `buffer` is not a parameter:
    it does not count as one and a checkpoint may leave it out.
    """

    shape: Shape
    group: str
    used: bool = True
    buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Tensors = dict[str, TensorInfo]


def parameters(tensors: Mapping[str, TensorInfo]) -> int:
    """Number of parameters; buffers do not count."""
    return sum(info.numel for info in tensors.values() if not info.buffer)


def _linear(name: str, out: int, inner: Shape, group: str, *, bias: bool = True, used: bool = True) -> Iterator[tuple[str, TensorInfo]]:
    yield f"{name}.weight", TensorInfo((out, *inner), group, used)
    if bias:
        yield f"{name}.bias", TensorInfo((out,), group, used)


def _block(config: DiTConfig, index: int) -> Iterator[tuple[str, TensorInfo]]:
    C, H, W = config.hidden, config.heads, config.glu_width
    softmax = config.is_softmax(index)
    prefix = f"blocks.{index}"
    attn, cross, mlp = f"{prefix}.attn", f"{prefix}.cross_attn", f"{prefix}.mlp"
    yield f"{prefix}.scale_shift_table", TensorInfo((6, C), "scale_shift_table")
    yield from _linear(f"{prefix}.plucker_proj", C, (C,), "plucker_proj")

    yield from _linear(f"{attn}.qkv", 3 * C, (C,), "attention", bias=False)
    for norm in ("q_norm", "k_norm"):
        yield f"{attn}.{norm}.weight", TensorInfo((C,), "attention")
    for gate in ("beta_proj", "gate_proj"):
        yield from _linear(f"{attn}.{gate}", H, (C,), "attention", used=not softmax)
    for vector in ("A_log", "dt_bias"):
        yield f"{attn}.{vector}", TensorInfo((H,), "attention", used=not softmax)
    yield f"{attn}.recall_gate", TensorInfo((1,), "attention", used=False, buffer=True)
    for projection in ("output_gate", "proj"):
        yield from _linear(f"{attn}.{projection}", C, (C,), "attention")
    for projection in ("q_proj_cam", "k_proj_cam", "v_proj_cam", "out_proj_cam"):
        yield from _linear(f"{attn}.{projection}", C, (C,), "camera")
    for norm in ("q_norm_cam", "k_norm_cam"):
        yield f"{attn}.{norm}.weight", TensorInfo((C,), "camera")
    if not softmax:
        yield f"{attn}.conv_k.weight", TensorInfo((C, 1, config.conv_kernel), "attention")
        yield f"{attn}.conv_k_cam.weight", TensorInfo((C, 1, config.conv_kernel), "camera")

    yield from _linear(f"{cross}.q_linear", C, (C,), "cross_attention")
    yield from _linear(f"{cross}.kv_linear", 2 * C, (C,), "cross_attention")
    for norm in ("q_norm", "k_norm"):
        yield f"{cross}.{norm}.weight", TensorInfo((C,), "cross_attention")
    yield from _linear(f"{cross}.proj", C, (C,), "cross_attention")

    yield from _linear(f"{mlp}.inverted_conv.conv", 2 * W, (C, 1, 1), "ffn")
    yield from _linear(f"{mlp}.depth_conv.conv", 2 * W, (1, 3, 3), "ffn")
    yield from _linear(f"{mlp}.point_conv.conv", C, (W, 1, 1), "ffn", bias=False)
    yield from _linear(f"{mlp}.t_conv", C, (C, FRAME_TAPS, 1), "ffn", bias=False)


def dit_tensors(config: DiTConfig) -> Tensors:
    """The transformer's tensors under their official names: at the official size 850 parameters and 20 `recall_gate` buffers."""
    C = config.hidden

    def outer() -> Iterator[tuple[str, TensorInfo]]:
        yield from _linear("x_embedder.proj", C, (config.in_channels, 1, 1, 1), "x_embedder")
        yield from _linear("plucker_embedder.proj", C, (config.plucker_channels, 1, 1, 1), "plucker_embedder")
        yield from _linear("raymap_embedder.proj", C, (RAYMAP_CHANNELS, 1, 1, 1), "raymap_embedder", used=False)
        yield from _linear("t_embedder.mlp.0", C, (TIME_FREQUENCIES,), "t_embedder")
        yield from _linear("t_embedder.mlp.2", C, (C,), "t_embedder")
        yield from _linear("t_block.1", 6 * C, (C,), "t_block")
        yield from _linear("y_embedder.y_proj.fc1", C, (config.caption_channels,), "y_embedder")
        yield from _linear("y_embedder.y_proj.fc2", C, (C,), "y_embedder")
        yield "attention_y_norm.weight", TensorInfo((C,), "attention_y_norm")
        for index in range(config.depth):
            yield from _block(config, index)
        yield "final_layer.scale_shift_table", TensorInfo((2, C), "final_layer")
        yield from _linear("final_layer.linear", config.in_channels, (C,), "final_layer")

    return dict(outer())


def vae_tensors(config: VAEConfig) -> Tensors:
    """The LTX-2 VAE's tensors under their diffusers names; `latents_mean` and `latents_std` are buffers that every checkpoint holds.

    Raises UserError where the widths are not those of an LTX-2 VAE (each decoder width twice the one before).
    """
    widths = config.decoder_widths[::-1]
    if any(a != 2 * b for a, b in pairwise(widths)):
        raise UserError(f"VAE decoder widths must double from one to the next, found {config.decoder_widths}; correct the configuration")
    pixels = 3 * config.patch**2
    # Stride products of the encoder's downsamplers: space, time, both, both.
    strides = (4, 2, 8, 8)

    def conv(name: str, out: int, inner: int) -> Iterator[tuple[str, TensorInfo]]:
        yield from _linear(f"{name}.conv", out, (inner, 3, 3, 3), name.partition(".")[0])

    def resnets(prefix: str, width: int, count: int) -> Iterator[tuple[str, TensorInfo]]:
        for layer in range(count):
            for which in ("conv1", "conv2"):
                yield from conv(f"{prefix}.resnets.{layer}.{which}", width, width)

    def everything() -> Iterator[tuple[str, TensorInfo]]:
        for name in ("latents_mean", "latents_std"):
            yield name, TensorInfo((config.latent_channels,), "statistics", buffer=True)
        width = config.latent_channels
        yield from conv("encoder.conv_in", width, pixels)
        for i, (out, stride) in enumerate(zip(config.encoder_widths, strides, strict=True)):
            yield from resnets(f"encoder.down_blocks.{i}", width, config.encoder_layers[i])
            yield from conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", out // stride, width)
            width = out
        yield from resnets("encoder.mid_block", width, config.encoder_layers[-1])
        yield from conv("encoder.conv_out", config.latent_channels + 1, width)

        width = widths[0]
        layers = config.decoder_layers[::-1]
        yield from conv("decoder.conv_in", width, config.latent_channels)
        yield from resnets("decoder.mid_block", width, layers[0])
        for i, count in enumerate(layers[1:]):
            yield from conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", 4 * width, width)
            width //= 2
            yield from resnets(f"decoder.up_blocks.{i}", width, count)
        yield from conv("decoder.conv_out", pixels, width)

    return dict(everything())


def text_tensors(config: TextConfig) -> Tensors:
    """The Gemma-2 encoder's tensors under the names of transformers' Gemma2Model."""
    C, D = config.hidden, config.head_dim
    tensors = {"embed_tokens.weight": TensorInfo((config.vocab, C), "embedding")}
    for index in range(config.layers):
        prefix = f"layers.{index}"
        shapes = {
            "self_attn.q_proj": (config.heads * D, C),
            "self_attn.k_proj": (config.kv_heads * D, C),
            "self_attn.v_proj": (config.kv_heads * D, C),
            "self_attn.o_proj": (C, config.heads * D),
            "mlp.gate_proj": (config.intermediate, C),
            "mlp.up_proj": (config.intermediate, C),
            "mlp.down_proj": (C, config.intermediate),
        }
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = TensorInfo(shape, name.partition(".")[0])
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{prefix}.{norm}_layernorm.weight"] = TensorInfo((C,), "norm")
    tensors["norm.weight"] = TensorInfo((C,), "norm")
    return tensors


def to_diffusers(name: str) -> str:
    """diffusers' name of a transformer tensor with this official name."""
    for official, diffusers in _TO_DIFFUSERS:
        if name.startswith(official):
            return diffusers + name.removeprefix(official)
    return name


def to_official(name: str) -> str:
    """Official name of a transformer tensor with this diffusers or official name."""
    for official, diffusers in _TO_DIFFUSERS:
        if name.startswith(diffusers):
            return official + name.removeprefix(diffusers)
    return name


def stored_prefix(names: Iterable[str]) -> str:
    """What a file puts before the transformer's names: "" as a rule, "model." in the streaming checkpoint, "weights." in recorded vectors.

    Raises CheckpointError where there is more than one transformer.
    """
    names = list(names)
    found = [[name.removesuffix(anchor) for name in names if name.endswith(anchor)] for anchor in _ANCHORS]
    if several := next((sorted(prefixes) for prefixes in found if len(prefixes) > 1), None):
        prefixes = ", ".join(map(repr, several))
        raise CheckpointError(f"expected one transformer in the file, found {len(several)} under {prefixes}; give a file with only one")
    return next((prefixes[0] for prefixes in found if prefixes), "")


@dataclass(frozen=True)
class Difference:
    """How the tensors that were found differ from those expected; each tuple is sorted as the table or the file is."""

    expected: int
    found: int
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshaped: tuple[tuple[str, Shape, Shape], ...] = ()  # name, expected, found

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshaped)

    def __len__(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.misshaped)

    def report(self, what: str, remedy: str, first: int = 5) -> str:
        """A few lines: counts and the first names of each kind of difference, then what to do."""
        shapes = [f"{name} is {_by(found)}, expected {_by(expected)}" for name, expected, found in self.misshaped]
        lines = [f"{what}: expected {self.expected} tensors, found {self.found}, and {len(self)} differ"]
        for title, names in (("missing", self.missing), ("unexpected", self.extra), ("of another shape", shapes)):
            if names:
                more = f", … {len(names) - first} more" if len(names) > first else ""
                lines.append(f"  {len(names)} {title}: {', '.join(names[:first])}{more}")
        return "\n".join([*lines, remedy])


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def difference(expected: Mapping[str, TensorInfo], found: Mapping[str, Shape], *, buffers_required: bool = False) -> Difference:
    """Compare names and shapes; buffers may be absent unless required, and IGNORED names may be present in any shape."""
    found = {name: tuple(shape) for name, shape in found.items() if name not in IGNORED}
    return Difference(
        len(expected),
        len(found),
        tuple(name for name, info in expected.items() if name not in found and (buffers_required or not info.buffer)),
        tuple(name for name in found if name not in expected),
        tuple((name, info.shape, found[name]) for name, info in expected.items() if name in found and found[name] != info.shape),
    )


def infer_dit_config(shapes: Mapping[str, Shape], *, what: str = "the checkpoint") -> DiTConfig:
    """The configuration whose tensor table is this set of official names and shapes (prefix already stripped).

    What shapes do not tell keeps its default: the latent grid, the number of text tokens, cross-attention heads (then as many as attention
    heads), and the switches between implementations. Raises CheckpointError with a report of what differs where no configuration fits.
    """
    config = fit_dit_config(shapes, what=what)
    if diff := difference(dit_tensors(config), shapes):
        raise CheckpointError(diff.report(what, "Use a complete stage-1 SANA-WM checkpoint; `sanawm checkpoint inspect` lists its parts."))
    return config


def fit_dit_config(shapes: Mapping[str, Shape], *, what: str = "the checkpoint") -> DiTConfig:
    """Like `infer_dit_config`, but of an incomplete or damaged set the configuration with the fewest differences.

    Raises CheckpointError only where the sizes cannot be told.
    """
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}

    def dim(suffix: str, axis: int) -> int:
        # The commonest value: one wrong tensor is then reported as such instead of spoiling the inference.
        values = Counter(shape[axis] for name, shape in shapes.items() if name.endswith(suffix) and len(shape) > axis)
        if not values:
            raise CheckpointError(f"{what} has no tensor named …{suffix}; expected the stage-1 transformer of a SANA-WM checkpoint")
        return values.most_common(1)[0][0]

    hidden, heads = dim(".attn.output_gate.weight", 0), dim(".attn.beta_proj.weight", 0)
    if hidden % heads:
        raise CheckpointError(f"{what} has width {hidden}, which its {heads} attention heads do not divide; expected a SANA-WM checkpoint")
    depth = max(blocks, default=-1) + 1
    if not 0 < depth <= len(shapes):
        raise CheckpointError(f"{what} has {len(shapes)} tensors and {depth} as its number of blocks; expected a SANA-WM checkpoint")
    base = DiTConfig()
    has_conv = any(name.endswith(".attn.conv_k.weight") for name in shapes)
    try:
        config = DiTConfig(
            in_channels=dim(_ANCHORS[0], 1),
            hidden=hidden,
            depth=depth,
            head_dim=hidden // heads,
            cross_heads=heads,
            mlp_ratio=dim(".mlp.point_conv.conv.weight", 1) // hidden,
            caption_channels=dim("y_embedder.y_proj.fc1.weight", 1),
            plucker_channels=dim("plucker_embedder.proj.weight", 1),
            conv_kernel=dim(".attn.conv_k.weight", 2) if has_conv else base.conv_kernel,
        )
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{what}: {error}") from error
    # Softmax blocks are those without a short convolution. The period that explains most names wins, the official one among equals.
    periods = sorted(range(1, depth + 2), key=lambda n: n != base.softmax_every)
    fits = [replace(config, softmax_every=period) for period in periods]
    return min(fits, key=lambda c: len(difference(dit_tensors(c), shapes)))

"""Signatures of the compiled programs: names, dtypes, shapes and meaning of every input and output, stated once.

Exporters name the graph's tensors from here, builders take shapes from here, the runtime allocates from here. State is explicit: what a chunk
leaves behind is an output of `commit_*` named `next.*`; the runtime hands it to the following chunk as `past.*`, and chunk 0's attention keys
and values to every later chunk as `sink.*`. Shapes are static; the three kinds of a chunk (first, second, steady) are separate programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sanawm.config import DiTConfig, WorldConfig
from sanawm.errors import UserError
from sanawm.vae_state import state_shapes

CHUNK_KINDS = ("first", "second", "steady")
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "bool": 1, "uint8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """A program's input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Program:
    """One compiled function."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec:
        return next(t for t in self.inputs if t.name == name)

    def output(self, name: str) -> TensorSpec:
        return next(t for t in self.outputs if t.name == name)


@dataclass(frozen=True)
class Geometry:
    """What fixes every shape: the model, the frames of the first chunk, the prompt's padded length, and the activations' dtype.

    first_frames is chunk_frames + T mod chunk_frames (4 for clips of 24k + 1 pixel frames). prompt_tokens is the padded length of chi prompt
    plus user prompt that the text encoder reads, of which it keeps text_tokens.
    """

    config: WorldConfig
    prompt_tokens: int
    first_frames: int = 4
    dtype: str = "float32"

    def __post_init__(self) -> None:
        stream = self.config.stream
        if (stream.cached_chunks, stream.sink) != (2, True):
            raise UserError(
                "compiled programs attend to the first and the previous chunk, cached_chunks 2 with a sink, "
                f"found cached_chunks {stream.cached_chunks}, sink {stream.sink}; use the torch sampler for another window"
            )

    def frames(self, kind: str) -> int:
        return self.first_frames if kind == "first" else self.config.stream.chunk_frames


def _block_state(config: DiTConfig, block: int, frames: int, dtype: str) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(field, dtype, shape, meaning) of what a chunk of `frames` frames leaves in a block; fields of `sanawm.model.dit.state.BlockState`."""
    C, H, D, S = config.hidden, config.heads, config.head_dim, config.tokens_per_frame
    if config.is_softmax(block):
        heads = (1, frames * S, H, D)
        yield "k", dtype, heads, "normalised, rotated keys of the chunk"
        yield "v", dtype, heads, "values of the chunk"
        yield "cam_k", dtype, heads, "camera branch keys after UCPE"
        yield "cam_v", dtype, heads, "camera branch values after UCPE"
    else:
        tail = (1, config.conv_kernel - 1, S, C)
        yield "s", "float32", (1, H, D, D), "main scan state, value x key"
        yield "z", "float32", (1, H, D), "main scan normaliser"
        yield "s_cam", "float32", (1, H, D, D), "camera scan state"
        yield "k_tail", dtype, tail, "last raw key frames, left context of the short convolution"
        if config.camera_conv_tail:
            yield "cam_tail", dtype, tail, "last raw camera key frames"
    yield "ffn_tail", dtype, (1, S, C), "last frame of the FFN's spatial output"


# Programs that only a start needs.
ENCODERS = ("text_encoder", "image_encoder")
ATTENTION_FIELDS = ("k", "v", "cam_k", "cam_v")


def state_specs(geometry: Geometry, kind: str, prefix: str) -> list[TensorSpec]:
    """State tensors that a chunk of a kind leaves, in block order, under `prefix`."""
    config = geometry.config.dit
    return [
        TensorSpec(f"{prefix}.{i}.{name}", dtype, shape, meaning)
        for i in range(config.depth)
        for name, dtype, shape, meaning in _block_state(config, i, geometry.frames(kind), geometry.dtype)
    ]


def _is_attention(spec: TensorSpec) -> bool:
    return spec.name.rsplit(".", 1)[1] in ATTENTION_FIELDS


def past_specs(geometry: Geometry, kind: str) -> list[TensorSpec]:
    """State inputs of a chunk of a kind: nothing, chunk 0's state, or the sink's attention entries and the previous chunk's state.

    The second chunk's sink is its previous chunk; it appears once, as `past.*`.
    """
    if kind == "first":
        return []
    if kind == "second":
        return state_specs(geometry, "first", "past")
    return [s for s in state_specs(geometry, "first", "sink") if _is_attention(s)] + state_specs(geometry, "steady", "past")


def camera_outputs(geometry: Geometry, kind: str) -> list[TensorSpec]:
    """Outputs of the camera program for a chunk of a kind."""
    config = geometry.config.dit
    N = geometry.frames(kind) * config.tokens_per_frame
    half, quarter = config.head_dim // 2, config.head_dim // 4
    return [
        TensorSpec("rays", "float32", (1, N, 4, 4), "world-to-ray matrices"),
        TensorSpec("rays_inverse", "float32", (1, N, 4, 4), "ray-to-world matrices"),
        TensorSpec("cos", "float32", (N, half), "rotary table"),
        TensorSpec("sin", "float32", (N, half), "rotary table"),
        TensorSpec("cam_cos", "float32", (N, quarter), "rotary table of the camera branch"),
        TensorSpec("cam_sin", "float32", (N, quarter), "rotary table of the camera branch"),
        *(TensorSpec(f"plucker.{i}", geometry.dtype, (1, N, config.hidden), "Plücker product of a block") for i in range(config.depth)),
    ]


def _text_outputs(geometry: Geometry) -> list[TensorSpec]:
    config = geometry.config.dit
    shape = (1, config.text_tokens, config.cross_heads, config.hidden // config.cross_heads)
    return [
        TensorSpec(f"{part}.{i}", geometry.dtype, shape, f"cross-attention {part} of a block")
        for part in ("keys", "values")
        for i in range(config.depth)
    ]


def _text(geometry: Geometry) -> TensorSpec:
    config = geometry.config.dit
    return TensorSpec("text", geometry.dtype, (1, config.text_tokens, config.caption_channels), "text embedding")


def _text_mask(geometry: Geometry) -> TensorSpec:
    return TensorSpec("text_mask", "bool", (1, geometry.config.dit.text_tokens), "true on real text tokens")


def _latents(geometry: Geometry, frames: int) -> TensorSpec:
    c = geometry.config.dit
    return TensorSpec("latents", geometry.dtype, (1, c.in_channels, frames, c.height, c.width), "normalised latent frames")


def _text_programs(geometry: Geometry) -> Iterator[Program]:
    L = geometry.prompt_tokens
    tokens = (
        TensorSpec("input_ids", "int64", (1, L), "token ids, right-padded"),
        TensorSpec("attention_mask", "int64", (1, L), "1 on real tokens"),
    )
    yield Program("text_encoder", tokens, (_text(geometry), _text_mask(geometry)))


def _vae_programs(geometry: Geometry) -> Iterator[Program]:
    config, dtype = geometry.config, geometry.dtype
    h, w = config.dit.height, config.dit.width
    H, W = config.image_height, config.image_width
    image = TensorSpec("image", "float32", (1, 3, 1, H, W), "first frame in [-1, 1]")
    yield Program("image_encoder", (image,), (_latents(geometry, 1),))
    states = list(state_shapes(config.vae, h, w))

    def decoder_state(prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{prefix}.{n}", dtype, tuple(shape), "last two input frames of a convolution") for n, shape in states)

    def frames(count: int) -> TensorSpec:
        return TensorSpec("frames", "uint8", (count, H, W, 3), "decoded RGB frames")

    stride = config.vae.temporal_stride
    yield Program("decode_first", (_latents(geometry, 1),), (frames(1), *decoder_state("next")))
    yield Program("decode", (_latents(geometry, 1), *decoder_state("past")), (frames(stride), *decoder_state("next")))


def _dit_programs(geometry: Geometry) -> Iterator[Program]:
    config = geometry.config.dit
    yield Program("prompt_kv", (_text(geometry),), tuple(_text_outputs(geometry)))
    for kind in CHUNK_KINDS:
        T = geometry.frames(kind)
        # Second and steady chunks have the same camera program.
        if kind != "second":
            time = (T, config.rope_pairs[0])
            inputs = (
                TensorSpec("camera_conditions", "float32", (1, T, 20), "camera-to-world and latent intrinsics of a frame"),
                TensorSpec("chunk_plucker", "float32", (1, config.plucker_channels, T, config.height, config.width), "Plücker maps, eight a frame"),
                TensorSpec("time_cos", "float32", time, "rotary time table of the absolute frame indices"),
                TensorSpec("time_sin", "float32", time, "rotary time table of the absolute frame indices"),
            )
            yield Program("camera_first" if kind == "first" else "camera", inputs, tuple(camera_outputs(geometry, kind)))
        latents = _latents(geometry, T)
        context = (_text_mask(geometry), *_text_outputs(geometry), *camera_outputs(geometry, kind), *past_specs(geometry, kind))
        timestep = TensorSpec("timestep", "float32", (1, T), "timestep of each frame, 0 to 1000")
        velocity = TensorSpec("velocity", geometry.dtype, latents.shape, "noise minus clean latents")
        yield Program(f"denoise_{kind}", (latents, timestep, *context), (velocity,))
        yield Program(f"commit_{kind}", (latents, *context), tuple(state_specs(geometry, kind, "next")))


# Parts of the model; the programs of one part share their weights.
PARTS = {"text": _text_programs, "vae": _vae_programs, "dit": _dit_programs}


def programs(geometry: Geometry, parts: Sequence[str] = tuple(PARTS)) -> dict[str, Program]:
    """The programs of a world, or of some `parts` of the model, by name."""
    return {p.name: p for part in parts for p in PARTS[part](geometry)}


def camera_program(kind: str) -> str:
    """Name of the camera program of a chunk kind."""
    return "camera_first" if kind == "first" else "camera"

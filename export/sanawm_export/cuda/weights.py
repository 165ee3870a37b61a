"""Packed weights of the transformer: which tensors the plans read, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from sanawm.camera.rope import rope_grid
from sanawm.config import DiTConfig
from sanawm.keys import dit_tensors
from sanawm_export.cuda.formats import GATES, Format, Formats
from sanawm_kernels.gemm.variants import padded
from sanawm_runtime.engines._cuda_pack import Encoding, Packed, Source

TIMESTEP_WIDTH = 256


class DiTWeights:
    """Packed tensors by name. `dtype` is the activations' ("bfloat16" or "float32"); `timesteps` get modulation rows, 0 last."""

    def __init__(self, config: DiTConfig, dtype: str, timesteps: tuple[int, ...], formats: Formats) -> None:
        self.config = config
        self.dtype = dtype
        self.timesteps = (*timesteps, 0)
        self.formats = formats
        self._shapes = {name: info.shape for name, info in dit_tensors(config).items()}

    @cached_property
    def tensors(self) -> Mapping[str, Packed]:
        found: dict[str, Packed] = {}
        for packed in self._all():
            if packed.name in found:
                raise ValueError(f"two packed weights are named {packed.name}")
            found[packed.name] = packed
        return found

    def merged(self, block: int) -> dict[str, tuple[str, ...]]:
        """Layers of each product of a block's modulated input by packed name; softmax blocks have no gates."""
        groups = self.formats.merged(block)
        if self.config.is_softmax(block):
            groups = {name: tuple(layer for layer in layers if layer not in GATES) for name, layers in groups.items()}
        return {name: layers for name, layers in groups.items() if layers}

    def composes_plucker(self, block: int) -> bool:
        """Whether a block's Plücker product takes the maps themselves, with a weight that has their embedding in it.

        The two layers have nothing between them, and the maps have 48 channels where their embedding has C. A product that is quantized takes the
        embedding, for which its activations' scale was calibrated.
        """
        return self.formats.of(f"blocks.{block}.plucker").kind == "plain"

    def _source(self, name: str) -> Source:
        return Source(name, self._shapes[name])

    def _plain(self, name: str, shape: tuple[int, ...], *sources: Source, op: str = "rows") -> Packed:
        return Packed(name, self.dtype, shape, op, sources, rounding=self.dtype)  # type: ignore[arg-type]

    def _product(self, name: str, rows: int, columns: int, sources: tuple[Source, ...], op: str = "rows") -> Iterator[Packed]:
        """The weight of a product in the format that the precision policy gives it."""
        layout = self.formats.of(name)

        def coded(suffix: str, dtype: str, shape: tuple[int, ...], encoding: Encoding) -> Packed:
            if layout.calibrated:
                return Packed(f"{name}.{suffix}", dtype, shape, "calibrated", sources, rounding=self.dtype)
            return Packed(f"{name}.{suffix}", dtype, shape, op, sources, (), encoding, self.dtype)  # type: ignore[arg-type]

        if layout.kind == "plain":
            yield self._plain(f"{name}.weight", (rows, columns), *sources, op=op)
        elif layout.kind == "fp8":
            yield coded("codes", "float8_e4m3fn", (rows, columns), "fp8_codes")
            yield coded("scales", "float32", (1 if layout.calibrated else rows,), "fp8_scales")
        else:
            yield coded("codes", "uint8", (rows, columns // 2), "nvfp4_codes")
            yield coded("blocks", "float8_e4m3fn", (rows, columns // 16), "nvfp4_scales")
            yield coded("global", "float32", (1,), "nvfp4_global")
        yield from _activation_scale(name, layout)

    def _linear(self, name: str, official: str, rows: int, columns: int, bias: bool = True) -> Iterator[Packed]:
        yield from self._product(name, rows, columns, (self._source(f"{official}.weight"),))
        if bias:
            yield self._plain(f"{name}.bias", (rows,), self._source(f"{official}.bias"))

    def _composed(self, name: str, last: str, first: str, rows: int, columns: int) -> Iterator[Packed]:
        """Two linear layers as one, which is not quantized."""
        sources = tuple(self._source(f"{layer}.{field}") for layer in (last, first) for field in ("weight", "bias"))
        yield self._plain(f"{name}.weight", (rows, columns), *sources, op="composed")
        yield self._plain(f"{name}.bias", (rows,), *sources, op="composed")

    def _all(self) -> Iterator[Packed]:
        c = self.config
        C = c.hidden
        yield from self._linear("x_embedder", "x_embedder.proj", C, c.in_channels)
        if not all(self.composes_plucker(i) for i in range(c.depth)):
            yield from self._linear("plucker_embedder", "plucker_embedder.proj", C, c.plucker_channels)
        yield from self._linear("caption.fc1", "y_embedder.y_proj.fc1", C, c.caption_channels)
        yield from self._linear("caption.fc2", "y_embedder.y_proj.fc2", C, C)
        yield self._plain("caption.norm", (C,), self._source("attention_y_norm.weight"))
        yield from self._linear("final", "final_layer.linear", c.in_channels, C)
        for i in range(c.depth):
            yield from self._block(i)
        yield from self._modulation()
        (row_cos, row_sin), (column_cos, column_sin) = rope_grid(c)
        for name, table in (("row_cos", row_cos), ("row_sin", row_sin), ("column_cos", column_cos), ("column_sin", column_sin)):
            yield Packed(f"rope.{name}", "float32", table.shape, "constant", (), tuple(float(x) for x in table.flat))

    def _block(self, i: int) -> Iterator[Packed]:
        c, name = self.config, f"blocks.{i}"
        C, G, H = c.hidden, c.glu_width, c.heads
        attn = f"{name}.attn"
        for merged, layers in self.merged(i).items():
            sources = tuple(self._source(f"{attn}.{layer}.weight") for layer in layers)
            columns = padded(sum(s.shape[0] for s in sources))
            yield from self._product(merged, columns, C, sources)
            biases = (Source("", (3 * C,)) if layer == "qkv" else self._source(f"{attn}.{layer}.bias") for layer in layers)
            yield self._plain(f"{merged}.bias", (columns,), *biases)
        for norm in ("q_norm", "k_norm", "q_norm_cam", "k_norm_cam"):
            yield self._plain(f"{name}.{norm}", (C,), self._source(f"{attn}.{norm}.weight"))
        if not c.is_softmax(i):
            for conv in ("conv_k", "conv_k_cam"):
                yield self._plain(f"{name}.{conv}", (C, c.conv_kernel), self._source(f"{attn}.{conv}.weight"))
            for gate in ("A_log", "dt_bias"):
                yield self._plain(f"{name}.{gate}", (H,), self._source(f"{attn}.{gate}"))
        yield from self._linear(f"{name}.out_cam", f"{attn}.out_proj_cam", C, C)
        yield from self._linear(f"{name}.proj", f"{attn}.proj", C, C)
        if self.composes_plucker(i):
            yield from self._composed(f"{name}.plucker", f"{name}.plucker_proj", "plucker_embedder.proj", C, c.plucker_channels)
        else:
            yield from self._linear(f"{name}.plucker", f"{name}.plucker_proj", C, C)
        cross = f"{name}.cross_attn"
        yield from self._linear(f"{name}.cross_q", f"{cross}.q_linear", C, C)
        yield from self._linear(f"{name}.cross_kv", f"{cross}.kv_linear", 2 * C, C)
        yield from self._linear(f"{name}.cross_proj", f"{cross}.proj", C, C)
        for norm in ("q_norm", "k_norm"):
            yield self._plain(f"{name}.cross_{norm}", (C,), self._source(f"{cross}.{norm}.weight"))
        mlp = f"{name}.mlp"
        yield from self._linear(f"{name}.inverted", f"{mlp}.inverted_conv.conv", 2 * G, C)
        yield self._plain(f"{name}.taps", (9, 2 * G), self._source(f"{mlp}.depth_conv.conv.weight"), op="taps")
        yield self._plain(f"{name}.taps.bias", (2 * G,), self._source(f"{mlp}.depth_conv.conv.bias"))
        yield from self._linear(f"{name}.point", f"{mlp}.point_conv.conv", C, G, bias=False)
        yield from self._product(f"{name}.temporal", C, 3 * C, (self._source(f"{mlp}.t_conv.weight"),), op="temporal")

    def _modulation(self) -> Iterator[Packed]:
        c = self.config
        layers = [f"{layer}.{field}" for layer in ("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1") for field in ("weight", "bias")]
        tables = [f"blocks.{i}.scale_shift_table" for i in range(c.depth)] + ["final_layer.scale_shift_table"]
        sources = tuple(self._source(name) for name in (*layers, *tables))
        steps = tuple(float(t) for t in self.timesteps)
        yield Packed("modulation", self.dtype, (len(steps), modulation_width(c)), "modulation", sources, steps, rounding=self.dtype)  # type: ignore[arg-type]
        yield Packed("timesteps", "float32", (len(steps),), "constant", (), steps)


def modulation_width(config: DiTConfig) -> int:
    """Columns of a timestep's modulation row: six of every block, two of the final layer, each C wide."""
    return (6 * config.depth + 2) * config.hidden


def _activation_scale(name: str, layout: Format) -> Iterator[Packed]:
    if layout.scale is not None:
        yield Packed(f"{name}.input_scale", "float32", (1,), "constant", (), (layout.scale,))

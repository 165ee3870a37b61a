"""The causal VAE decoder's `decode_first` and `decode` programs as launches.

Frames are channels-last in memory, and so is the decoder's state, whatever axes its signature names: only this engine's programs read it.
Shapes: T frames, H rows, W columns, M = T*H*W pixels, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sanawm.programs import Program
from sanawm.vae_state import DecoderConv, decoder_convs
from sanawm_export.cuda.tape import Lowered, Tape
from sanawm_export.cuda.vae_weights import DecoderWeights
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.conv import plans
from sanawm_kernels.conv.plans import Mode
from sanawm_kernels.gemm.table import MULTIPROCESSORS
from sanawm_runtime.engines._cuda_plan import TRITON_TYPES, View, dense


@dataclass(frozen=True)
class Frames:
    """Channels-last frames: pixels (M, C) and their arrangement."""

    pixels: View
    count: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


def lower_decode(program: Program, weights: DecoderWeights, target: int) -> Lowered:
    """One latent frame to pixels for compute capability `target`: one at the start of a clip, then eight."""
    channels = (conv.in_channels for conv in decoder_convs(weights.config))
    described = plans.described(TRITON_TYPES[weights.dtype], target, channels)
    return (_DescribedDecoder if described else _Decoder)(program, weights, target).lower()


class _Decoder:
    """Convolutions that compute the address of every pixel: frames follow each other, as pixels do."""

    def __init__(self, program: Program, weights: DecoderWeights, target: int) -> None:
        self.tape, self.weights, self.target = Tape(program), weights, target
        self.kind = TRITON_TYPES[weights.dtype]
        self.first = not any(t.name.startswith("past.") for t in program.inputs)
        self.convs = {conv.name: conv for conv in decoder_convs(weights.config)}

    def lower(self) -> Lowered:
        z = self.tape.input("latents")
        _, C, _, h, w = z.shape
        start = self.tape.tensor("latent", (h * w, C), self.weights.dtype)
        statistics = {name: self._weight(f"latents_{name}") for name in ("mean", "std")}
        bindings = {"z": z, **statistics, "out": start, "S": h * w, "C": C}
        self.tape.launch("latent", plans.latent_rows(self.kind), bindings, ("out",))
        x = self._conv("conv_in", Frames(start, 1, h, w), "plain")
        blocks: dict[str, None] = dict.fromkeys(name.partition(".resnets.")[0].partition(".upsamplers.")[0] for name in self.convs if "." in name)
        for block in blocks:
            if f"{block}.upsamplers.0.conv" in self.convs:
                x = self._conv(f"{block}.upsamplers.0.conv", x, "upsample")
            layers = sum(name.startswith(f"{block}.resnets.") for name in self.convs) // 2
            for layer in range(layers):
                name = f"{block}.resnets.{layer}"
                y = self._conv(f"{name}.conv1", self._normalised(f"{name}.conv1", x), "plain")
                x = self._conv(f"{name}.conv2", self._normalised(f"{name}.conv2", y), "residual", residual=x)
        self._conv("conv_out", self._normalised("conv_out", x), "pixels")
        return self.tape.finish()

    def _weight(self, name: str) -> View:
        packed = self.weights.tensors[name]
        return self.tape.weight(name, packed.dtype, packed.shape)

    def _state(self, prefix: str, conv: str) -> View:
        """The two frames that a convolution carries, (2*H*W, C), under the signature's name."""
        name = f"{prefix}.{conv}"
        whole = self.tape.input(name) if prefix == "past" else self.tape.output(name)
        shape = (math.prod(whole.shape) // self.convs[conv].in_channels, self.convs[conv].in_channels)
        return View(name, whole.dtype, shape, dense(shape))

    def _normalised(self, conv: str, x: Frames) -> Frames:
        """Input of a convolution: normalised, through SiLU. With two frames or more the last two go to the new state at once."""
        M, C = x.pixels.shape
        out = self.tape.tensor(f"{conv}.input", (M, C), self.weights.dtype)
        kept = x.count >= 2
        bindings = {"x": x.pixels, "out": out, "M": M, "KEPT": M - 2 * x.area, "state": self._state("next", conv) if kept else None}
        self.tape.launch(f"{conv}.norm", plans.norm_silu(self.kind, C, kept), bindings, ("out", "state"))
        return Frames(out, x.count, x.height, x.width)

    def _keep(self, conv: str, x: Frames) -> None:
        """The last two frames of [state, x] to the new state, where no kernel did it."""
        state, area = self._state("next", conv), x.area
        if x.count >= 2:
            self.tape.copy(f"{conv}.state", x.pixels.narrow(0, (x.count - 2) * area, 2 * area), state)
            return
        before = x.pixels if self.first else self._state("past", conv).narrow(0, area, area)
        self.tape.copy(f"{conv}.state.0", before, state.narrow(0, 0, area))
        self.tape.copy(f"{conv}.state.1", x.pixels, state.narrow(0, area, area))

    def _conv(self, name: str, x: Frames, mode: Mode, residual: Frames | None = None) -> Frames:
        conv: DecoderConv = self.convs[name]
        if x.count < 2 or mode == "upsample" or name == "conv_in":
            self._keep(name, x)
        M, N = x.pixels.shape[0], conv.out_channels
        patch = self.weights.config.patch
        variant = plans.causal_conv(self.kind, self.target, x.count, x.height, x.width, conv.in_channels, N, mode, self.first, patch)
        result = self._result(name, x, N, mode)
        bindings = {
            "x": x.pixels, "past": None if self.first else self._state("past", name), "weight": self._weight(f"{name}.weight"),
            "bias": self._weight(f"{name}.bias"), "residual": None if residual is None else residual.pixels, "out": result.pixels, "M": M,
        }  # fmt: skip
        self.tape.launch(name, variant, bindings, ("out",), flops=2 * M * N * 27 * conv.in_channels, unit=self.kind)
        return result

    def _result(self, name: str, x: Frames, channels: int, mode: Mode) -> Frames:
        if mode == "pixels":
            return self._images(x)
        if mode == "upsample":
            count, channels = 2 * x.count - self.first, channels // 8
            height, width = 2 * x.height, 2 * x.width
        else:
            count, height, width = x.count, x.height, x.width
        return Frames(self.tape.tensor(name, (count * height * width, channels), self.weights.dtype), count, height, width)

    def _images(self, x: Frames) -> Frames:
        frames = self.tape.output("frames")
        return Frames(frames.reshape(math.prod(frames.shape) // 3, 3), x.count, frames.shape[1], frames.shape[2])


class _DescribedDecoder(_Decoder):
    """Convolutions with descriptors: each takes padded frames from a launch of its own, and leaves its rows apart as far as those are.

    That launch writes the state too, and normalises what is to be normalised. Pixels of results are views (T, H, W, C).
    """

    def __init__(self, program: Program, weights: DecoderWeights, target: int) -> None:
        super().__init__(program, weights, target)
        self.selections: dict[tuple[Mode, int, int], View] = {}

    def _normalised(self, conv: str, x: Frames) -> Frames:
        C = x.pixels.shape[-1]
        return self._padded(conv, x, plans.padded(self.kind, x.count, x.height, x.width, C, self.first, True), f"{conv}.norm")

    def _padded(self, conv: str, x: Frames, variant: KernelVariant, label: str) -> Frames:
        """`x` as a convolution takes it, (T + 2, H + 2, W + 2, C)."""
        out = self.tape.tensor(f"{conv}.input", ((x.count + 2) * (x.height + 2) * (x.width + 2), x.pixels.shape[-1]), self.weights.dtype)
        bindings = {"x": x.pixels, "past": None if self.first else self._state("past", conv), "out": out, "state": self._state("next", conv)}
        self.tape.launch(label, variant, bindings, ("out", "state"))
        return Frames(out, x.count, x.height, x.width)

    def _conv(self, name: str, x: Frames, mode: Mode, residual: Frames | None = None) -> Frames:
        conv: DecoderConv = self.convs[name]
        T, H, W, C, N = x.count, x.height, x.width, conv.in_channels, conv.out_channels
        skip = None if residual is None else residual.pixels
        if name == "conv_in":
            x = self._padded(name, x, plans.padded_latent(self.kind, H, W, C, self.first), f"{name}.padded")
        elif mode == "upsample":
            skip = x.pixels
            x = self._padded(name, x, plans.padded(self.kind, T, H, W, C, self.first, False), f"{name}.padded")
        tile = plans.config(self.kind, self.target, C, N, mode)
        parts, rows = tile.splits > 1, T * plans.frame_stride(H, W)
        bias = self._weight(f"{name}.bias")
        result = self._result(name, x, N, mode)
        out = self._pitched(f"{name}.parts", tile.splits * T, H, W, N, "float32") if parts else result.pixels
        bindings = {
            "x": x.pixels, "weight": self._weight(f"{name}.weight"), "bias": bias, "skip": None if skip is None else _matrix(skip),
            "out": out if mode in ("pixels", "upsample") else _matrix(out), "select": None if skip is None or parts else self._selection(mode, C, N),
        }  # fmt: skip
        variant = plans.described_conv(self.kind, T, H, W, C, N, mode, self.first, tile, self.weights.config.patch)
        flops = 2 * T * H * W * N * 27 * C
        self.tape.launch(name, variant, bindings, ("out",), flops=flops, unit=self.kind, SMS=MULTIPROCESSORS[self.target])
        if parts:
            bindings = {"parts": out, "bias": bias, "residual": skip, "out": result.pixels}
            self.tape.launch(f"{name}.sum", plans.summed(self.kind, rows, N, tile.splits, skip is not None), bindings, ("out",))
        return result

    def _selection(self, mode: Mode, channels: int, made: int) -> View:
        """The matrix that picks what a convolution adds, made once."""
        key = (mode, channels, made)
        if key not in self.selections:
            self.selections[key] = self.tape.tensor(f"{mode}.c{channels}.selection", (made, channels), self.weights.dtype)
            self.tape.launch(f"{mode}.c{channels}", plans.selection(self.kind, channels, made, mode), {"out": self.selections[key]}, ("out",))
        return self.selections[key]

    def _result(self, name: str, x: Frames, channels: int, mode: Mode) -> Frames:
        if mode == "pixels":
            return self._images(x)
        count, height, width = x.count, x.height, x.width
        if mode == "upsample":
            count, height, width, channels = 2 * count - self.first, 2 * height, 2 * width, channels // 8
        return Frames(self._pitched(name, count, height, width, channels, self.weights.dtype), count, height, width)

    def _pitched(self, name: str, count: int, height: int, width: int, channels: int, dtype: str) -> View:
        """The pixels of a new tensor of frames whose rows are two pixels apart."""
        stride = plans.frame_stride(height, width)
        whole = self.tape.tensor(name, (count * stride, channels), dtype)
        return replace(whole, shape=(count, height, width, channels), strides=(stride * channels, (width + 2) * channels, channels, 1))


def _matrix(frames: View) -> View:
    """Pitched frames as rows of channels, with what lies between their rows and after the last."""
    count, stride, channels = frames.shape[0], frames.strides[0], frames.shape[3]
    return replace(frames, shape=(count * stride // channels, channels), strides=(channels, 1))

"""The `image_encoder` program as launches: the first frame to its normalised latent.

Frames are channels-last in memory. Shapes: H rows, W columns, M = H*W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from sanawm.programs import Program
from sanawm_export.cuda.image_weights import ImageWeights, Stride
from sanawm_export.cuda.tape import Lowered, Tape
from sanawm_kernels.conv import plans as conv
from sanawm_kernels.image import plans
from sanawm_kernels.image.plans import Mode
from sanawm_runtime.engines._cuda_plan import TRITON_TYPES, View


@dataclass(frozen=True)
class Frame:
    """A channels-last frame: pixels (M, C) and their arrangement."""

    pixels: View
    height: int
    width: int

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]


def lower_image(program: Program, weights: ImageWeights, target: int) -> Lowered:
    """Image (1, 3, 1, H, W) to latents (1, C, 1, h, w) for compute capability `target`."""
    return _ImageEncoder(program, weights, target).lower()


class _ImageEncoder:
    def __init__(self, program: Program, weights: ImageWeights, target: int) -> None:
        self.tape, self.weights, self.target = Tape(program), weights, target
        self.kind = TRITON_TYPES[weights.dtype]

    def lower(self) -> Lowered:
        image, patch = self.tape.input("image"), self.weights.config.patch
        H, W = (side // patch for side in image.shape[3:])
        start = self._tensor("patches", H, W, 3 * patch**2)
        self.tape.launch("patches", plans.patches(self.kind, H, W, patch), {"image": image, "out": start.pixels}, ("out",))
        x = self._conv("conv_in", start, self.weights.config.latent_channels)
        for name, layers, channels, made, stride in self.weights.stages:
            for layer in range(layers):
                block = f"{name}.resnets.{layer}"
                y = self._conv(f"{block}.conv1", self._normalised(f"{block}.conv1", x), channels)
                x = self._conv(f"{block}.conv2", self._normalised(f"{block}.conv2", y), channels, "residual", x)
            if stride is not None:
                x = self._downsampled(f"{name}.downsamplers.0", x, made, stride)
        self._conv("conv_out", self._normalised("conv_out", x), self.weights.config.latent_channels, "latent")
        return self.tape.finish()

    def _tensor(self, name: str, height: int, width: int, channels: int) -> Frame:
        return Frame(self.tape.tensor(name, (height * width, channels), self.weights.dtype), height, width)

    def _weight(self, name: str) -> View:
        packed = self.weights.tensors[name]
        return self.tape.weight(name, packed.dtype, packed.shape)

    def _normalised(self, name: str, x: Frame) -> Frame:
        """Input of a convolution: normalised, through SiLU."""
        out = self._tensor(f"{name}.input", x.height, x.width, x.channels)
        bindings = {"x": x.pixels, "out": out.pixels, "M": x.pixels.shape[0], "KEPT": 0}
        self.tape.launch(f"{name}.norm", conv.norm_silu(self.kind, x.channels, False), bindings, ("out",))
        return out

    def _conv(self, name: str, x: Frame, made: int, mode: Mode = "plain", residual: Frame | None = None) -> Frame:
        M = x.pixels.shape[0]
        if mode == "latent":
            latents = self.tape.output("latents")
            result = Frame(latents.reshape(made, M), x.height, x.width)
        else:
            result = self._tensor(name, x.height, x.width, made)
        bindings = {
            "x": x.pixels, "weight": self._weight(f"{name}.weight"), "bias": self._weight(f"{name}.bias"),
            "residual": None if residual is None else residual.pixels, "out": result.pixels,
        }  # fmt: skip
        if mode == "latent":
            bindings |= {part: self._weight(f"latents_{part}") for part in ("mean", "std")}
        variant = plans.frame_conv(self.kind, self.target, x.height, x.width, x.channels, made, mode)
        self.tape.launch(name, variant, bindings, ("out",), flops=2 * M * made * 9 * x.channels, unit=self.kind)
        return result

    def _downsampled(self, name: str, x: Frame, made: int, stride: Stride) -> Frame:
        y = self._conv(f"{name}.conv", x, made)
        out = self._tensor(name, x.height // stride[1], x.width // stride[2], made * stride[0] * stride[1] * stride[2])
        size = out.pixels.shape[0] * out.channels
        variant = plans.downsample(self.kind, x.height, x.width, x.channels, made, stride)
        self.tape.launch(name, variant, {"y": y.pixels, "x": x.pixels, "out": out.pixels, "SIZE": size}, ("out",))
        return out

"""Plain definitions of the encoders' kernels, reading and writing the arguments of their launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sanawm_kernels.image import naive as image
from sanawm_kernels.image.plans import MODES
from sanawm_kernels.numerics import wide
from sanawm_kernels.text import naive as text

Arguments = Mapping[str, Any]


def embed_rows(a: Arguments, c: Arguments) -> None:
    stream, out = text.embed(a["ids"], a["table"], a["scale"], a["gain"], c["EPS"])
    a["updated"].copy_(stream)
    a["out"].copy_(out)


def add_normed(a: Arguments, c: Arguments) -> None:
    stream, out = text.add_normed(a["x"], a["branch"], a["post"], a["pre"], c["EPS"])
    if "updated" in a:
        a["updated"].copy_(stream)
    a["out"].copy_(out)


def rotate_halves(a: Arguments, c: Arguments) -> None:
    H, D = c["HEADS"], c["D"]
    a["out"].copy_(text.rotate_halves(a["x"][:, : H * D].unflatten(1, (H, D)), a["frequencies"]).flatten(1))


def causal_attention(a: Arguments, c: Arguments) -> None:
    q, k, v = (a[name].unflatten(1, (-1, c["D"])) for name in "qkv")
    a["out"].copy_(text.causal_attention(q, k, v, a["mask"], a["softmax_scale"], c["CAP"]).flatten(1))


def gelu_gated(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(text.gelu_gated(a["x"]))


def token_mask(a: Arguments, c: Arguments) -> None:
    a["out"].copy_(text.token_mask(a["mask"], a["K"]).reshape(a["out"].shape))


def patches(a: Arguments, c: Arguments) -> None:
    shape = (3, c["H"] * c["PATCH"], c["W"] * c["PATCH"])
    a["out"].copy_(image.patches(a["image"].reshape(shape), c["PATCH"], a["out"].dtype).flatten(0, 1))


def frame_conv(a: Arguments, c: Arguments) -> None:
    y = image.frame_conv(a["x"].reshape(c["H"], c["W"], c["C"]), a["weight"], a["bias"])
    if c["MODE"] == MODES["latent"]:
        y = image.normalised_latent(y, a["mean"], a["std"], a["out"].dtype)
    elif c["MODE"] == MODES["residual"]:
        y = y + wide(a["residual"]).reshape(y.shape)
    a["out"].copy_(y.reshape(a["out"].shape))


def downsample(a: Arguments, c: Arguments) -> None:
    y, x = (a[name].reshape(c["H"], c["W"], -1) for name in "yx")
    a["out"].copy_(image.downsampled(y, x, (c["ST"], c["SY"], c["SX"])).reshape(a["out"].shape))


DEFINITIONS: Mapping[str, Callable[[Arguments, Arguments], None]] = {
    **{f"sanawm_kernels.text.kernels:{f.__name__}": f for f in (embed_rows, add_normed, rotate_halves, causal_attention, gelu_gated, token_mask)},
    **{f"sanawm_kernels.image.kernels:{f.__name__}": f for f in (patches, frame_conv, downsample)},
}

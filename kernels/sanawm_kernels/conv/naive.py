"""Plain torch definitions of the causal VAE decoder's operations.

Shapes: T frames, H rows, W columns, M = T*H*W pixels (frame-major), C channels; frames are channels-last, (T, H, W, C) or (M, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm_kernels.numerics import wide

NORM_EPS = 1e-8
CONTEXT = 2


def latent_rows(z_CS: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """De-normalised latent, channel-major (C, S) to channels-last (S, C), in z's dtype."""
    return (wide(z_CS) * wide(std_C)[:, None] + wide(mean_C)[:, None]).t().to(z_CS.dtype)


def norm_silu(x_MC: Tensor) -> Tensor:
    """SiLU of each pixel divided by the root of its mean square (plus 1e-8) over the channels, in x's dtype."""
    x = wide(x_MC)
    return F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)).to(x_MC.dtype)


def padded(x_THWC: Tensor, past_2HWC: Tensor | None) -> Tensor:
    """Frames as a convolution sees them, (T + 2, H + 2, W + 2, C): after `past`, or the first frame twice, in a border of reflected pixels."""
    before = x_THWC[:1].expand(CONTEXT, -1, -1, -1) if past_2HWC is None else past_2HWC
    rows, columns = ([1, *range(n), n - 2] for n in x_THWC.shape[1:3])
    return torch.cat((before, x_THWC))[:, rows][:, :, columns]


def padded_conv(x_THWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3x3 convolution of frames from `padded` in `wide` precision; weight (N, 27 C), input index ((dt*3 + dy)*3 + dx)*C + channel."""
    kernel = wide(weight).reshape(-1, 3, 3, 3, x_THWC.shape[-1]).permute(0, 4, 1, 2, 3)
    return F.conv3d(wide(x_THWC).permute(3, 0, 1, 2)[None], kernel, None if bias is None else wide(bias))[0].permute(1, 2, 3, 0)


def causal_conv(x_THWC: Tensor, past_2HWC: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3x3 convolution, (T, H, W, C) to (T, H, W, N) in `wide` precision, weights as in `padded_conv`.

    The two frames before the first are `past`, or the first frame itself; rows and columns beyond the edge are reflected.
    """
    return padded_conv(padded(x_THWC, past_2HWC), weight, bias)


def frames(x_RC: Tensor, T: int, H: int, W: int, pitch: int) -> Tensor:
    """(T, H, W, C) of evenly spaced frames whose rows are `pitch` pixels apart."""
    C = x_RC.shape[-1]
    return x_RC.reshape(T, -1, C)[:, : H * pitch].reshape(T, H, pitch, C)[:, :, :W]


def upsampled(y_THWN: Tensor, x_THWC: Tensor, starts_clip: bool) -> Tensor:
    """Depth to space by (2, 2, 2) of y plus the repeated input, (T, H, W, 4C) to (2T, 2H, 2W, C/2); a clip's first new frame is dropped.

    Channels of y are ordered sub-pixel first: index (dt*4 + dy*2 + dx) * C/2 + c holds what the model calls channel 8c + dt*4 + dy*2 + dx.
    """
    T, H, W, C = x_THWC.shape
    half = C // 2
    c, sub = torch.arange(half), torch.arange(8)
    skip = wide(x_THWC)[..., ((8 * c[None, :] + sub[:, None]) % C).reshape(-1)]
    summed = (y_THWN + skip).to(x_THWC.dtype).reshape(T, H, W, 2, 2, 2, half)
    out = summed.permute(0, 3, 1, 4, 2, 5, 6).reshape(2 * T, 2 * H, 2 * W, half)
    return out[1:] if starts_clip else out


def selection(out_channels: int, channels: int, upsample: bool) -> Tensor:
    """A one in each row (N, C), at the channel that is added to that channel of a result: the same one, or the one that `upsampled` repeats."""
    channel = torch.arange(out_channels)
    half = out_channels // 8
    wanted = (8 * (channel % half) + channel // half) % channels if upsample else channel
    return F.one_hot(wanted, channels).float()


def pixels(y_THWN: Tensor, patch: int) -> Tensor:
    """Bytes (T, patch*H, patch*W, 3) of y (T, H, W, 3 patch^2), near [-1, 1]; channels ordered row, column, colour. Ties go to the even level."""
    T, H, W, _ = y_THWN.shape
    video = y_THWN.reshape(T, H, W, patch, patch, 3).permute(0, 1, 3, 2, 4, 5).reshape(T, H * patch, W * patch, 3)
    return ((wide(video) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)

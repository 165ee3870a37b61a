"""Weights of the tiny DiT before training.

Half an hour on a CPU is too short for so small a network to find out by itself that a view is made of earlier views along the same rays. So
training starts from a network that already does that roughly, and learns depth, tiles, detail and what to do with what was never seen:

* The latent is embedded beside a constant; layer norms, dominated by the constant, pass it almost linearly, and the final layer reads it back.
  The velocity is noise minus clean latent, and this path gives the noise.
* In the softmax block the camera branch looks up the clean latent: its constant queries and keys are the ray's own axis, which the camera
  encoding turns into world directions, so attention compares the directions of two rays; rotary pairs of the time axis prefer recent frames.
  The key's sign tells committed frames, embedded at t = 0, from frames still full of noise, which are avoided.
* Every other branch starts small and random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sanawm.config import DiTConfig
from sanawm.model.dit import SanaWM

# Sizes in the residual stream of the latent, of what was looked up, and of the constant.
SIGNAL, CARRIER = 0.5, 1.0
# Attention logits at equal directions and at equal times, of recent frames against older ones.
DIRECTION_LOGIT, RECENCY_LOGIT = 260.0, 24.0
# Channels of a head's first half go through the ray matrix in groups of four, of which the first three rotate.
GROUP = 4


@torch.no_grad()
def initialise(model: SanaWM, seed: int) -> None:
    """Set every parameter; see above."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            p.uniform_(-0.5, -0.01)
        elif last == "dt_bias":
            p.uniform_(-5.0, -1.0)
        elif "conv_k" in name:
            p.zero_()
            p[..., -1] = 1
        elif "norm" in name:
            p.fill_(1.0)
        elif p.ndim == 1 or last == "scale_shift_table":
            p.zero_()
        else:
            ends_branch = "blocks" in name and (name.endswith(("proj.weight", "out_proj_cam.weight")) or "point_conv" in name or "t_conv" in name)
            p.normal_(std=(0.1 if ends_branch else 1.0) / math.sqrt(p[0].numel()))
    for block in model.blocks:
        block.scale_shift_table[[2, 5]] = 1.0
    config = model.config
    embed, found, flag = _directions(config)
    _pass_latent(model, embed, found)
    _flag_committed_frames(model, flag)
    _look_up_rays(model, embed, found, flag)


def _directions(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal directions of the residual stream for the latent and for what is looked up, (C, C_in) each, and for the flag, (C,)."""
    width, channels = config.hidden, config.in_channels
    fixed = torch.stack([torch.ones(width), _carrier(width)], 1)
    frame = torch.linalg.qr(torch.cat([fixed, torch.randn(width, 2 * channels + 1)], 1))[0][:, 2:]
    size = SIGNAL * math.sqrt(width / channels)
    return frame[:, :channels] * size, frame[:, channels : 2 * channels] * size, frame[:, -1]


def _carrier(width: int) -> Tensor:
    return CARRIER * (1 - 2 * (torch.arange(width) % 2).float())


def _read(directions: Tensor, norm: float) -> Tensor:
    """Rows that read what `directions` embed out of a stream of that RMS after its layer norm."""
    return norm * directions.T / directions[:, 0].square().sum()


def _pass_latent(model: SanaWM, embed: Tensor, found: Tensor) -> None:
    projection = model.x_embedder.proj
    projection.weight.copy_(embed.reshape(projection.weight.shape))
    assert projection.bias is not None
    projection.bias.copy_(_carrier(len(embed)))
    norm = math.sqrt(2 * SIGNAL**2 + CARRIER**2)
    # Between 1 and 1 / 0.727, the factors that the first and the last step need.
    model.final_layer.linear.weight.copy_(1.1 * (_read(embed, norm) - _read(found, norm)))


def _flag_committed_frames(model: SanaWM, flag: Tensor) -> None:
    """Shift the first modulated norm of every block along `flag` by about +1 at t = 0 and -1 at the noisy timesteps."""
    first, second, table = model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.t_block[1]
    table.weight.mul_(0.05)
    # Cosines of the fast half of the frequencies are all one at t = 0 and average out at others.
    fast = 40
    first.weight[0] = 0
    first.weight[0, :fast] = 6.0 / fast
    first.bias[0] = -3.0
    second.weight[:, 0], second.weight[0] = 0, 0
    second.weight[0, 0] = 1.0
    # SiLU twice: about 2.7 at t = 0 and about -0.1 else.
    table.weight[:, 0] = 0
    table.weight[: len(flag), 0] = flag * 0.75
    table.bias[: len(flag)] = -flag


def _look_up_rays(model: SanaWM, embed: Tensor, found: Tensor, flag: Tensor) -> None:
    config = model.config
    index = next(i for i in range(config.depth) if config.is_softmax(i))
    attention = model.blocks[index].attn
    D, half = config.head_dim, config.head_dim // 2
    groups, heads = half // GROUP, config.heads
    axis = torch.zeros(heads, D)
    axis[:, 2:half:GROUP] = 1.0
    # Two time pairs of the camera's rotary table, which turn 0.2 and 0.05 radians a frame.
    axis[:, [half + 2, half + 4]] = math.sqrt(groups * RECENCY_LOGIT / DIRECTION_LOGIT)
    pattern = axis.flatten()
    unit = pattern / pattern.square().mean().sqrt()
    # Product of the two norm weights that gives DIRECTION_LOGIT after the softmax scale.
    per_head = groups * float(unit.max()) ** 2 * config.camera_scale
    gain = math.sqrt(DIRECTION_LOGIT / per_head)
    for projection, norm in ((attention.q_proj_cam, attention.q_norm_cam), (attention.k_proj_cam, attention.k_norm_cam)):
        projection.weight.mul_(0.02)
        norm.weight.copy_(gain * torch.where(pattern > 0, 1.0, 0.1))
    attention.q_proj_cam.bias.copy_(pattern)
    attention.k_proj_cam.weight.add_(torch.outer(pattern, flag))

    places = [h * D + g * GROUP + c for h in range(heads) for g in range(groups) for c in range(GROUP - 1)][: config.in_channels]
    attention.v_proj_cam.weight[places] = _read(embed, math.hypot(SIGNAL, CARRIER))
    attention.out_proj_cam.weight.mul_(0.1)
    attention.out_proj_cam.weight[places] = torch.eye(config.hidden)[places]
    attention.proj.weight[:, places] = found
    attention.output_gate.weight.mul_(0.1)
    attention.output_gate.bias.fill_(1.28)  # SiLU(1.28) = 1

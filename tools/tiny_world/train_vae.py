"""Training of the tiny world's VAE on rendered clips.

Letters: B batch, C channels, F pixel frames, H and W pixel rows and columns.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sanawm.config import tiny_config
from sanawm.model.vae import VideoVAE
from sanawm.model.vae.temporal import Causal
from sanawm.model.vae.vae import per_channel
from tiny_world.optim import Optimizer

# Noise on the latent, so the decoder bears the DiT's errors; while the encoder is frozen, in units of the latent's standard deviation.
LATENT_NOISE = 0.1
STD_FLOOR = 0.05
# Until this fraction of the time: batch, frames, height, width.
STAGES = ((0.75, 2, 9, 96, 160), (2.0, 1, 9, 192, 320))


def initialise(vae: VideoVAE) -> None:
    """Residual branches start at a tenth of their usual size."""
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=(0.1 if name.endswith("conv2.conv") else 1.0) / math.sqrt(module.in_channels * 27))
            torch.nn.init.zeros_(module.bias)


def window(clips: np.ndarray, rng: np.random.Generator, frames: int, batch: int, height: int, width: int) -> Tensor:
    """Random crops in time and space, half of them mirrored, (B, 3, F, height, width) in [-1, 1]."""
    out = []
    for _ in range(batch):
        clip = clips[rng.integers(len(clips))]
        t, y, x = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(clip.shape, (frames, height, width)))
        pixels = clip[t : t + frames, y : y + height, x : x + width]
        out.append(pixels[:, :, ::-1] if rng.random() < 0.5 else pixels)
    video = torch.from_numpy(np.stack(out))
    return (video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(torch.bfloat16)


def reconstruct(vae: VideoVAE, video: Tensor, decoder_only: bool) -> tuple[Tensor, Tensor]:
    """Decoded video and the latent's mean (unnormalised)."""
    with torch.set_grad_enabled(not decoder_only):
        mean = vae.encoder(video)[:, : vae.config.latent_channels]
    noise = LATENT_NOISE * (per_channel(vae.latents_std) if decoder_only else 1.0)
    return vae.decoder(mean + noise * torch.randn_like(mean), Causal()), mean


def loss_of(decoded: Tensor, video: Tensor) -> Tensor:
    """L1 at full and half resolution, and L1 of differences between neighbours, so edges count."""
    error = decoded.float() - video.float()
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    B, _, frames, height, width = error.shape
    coarse = F.avg_pool2d(error.transpose(1, 2).reshape(B * frames, 3, height, width), 4).abs().mean()
    return error.abs().mean() + edges + coarse + 0.5 * error.square().mean()


def train(vae: VideoVAE, clips: np.ndarray, seconds: float, lr: float, seed: int, decoder_only: bool) -> None:
    """Train for so many seconds of wall time, the decoder alone if asked."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vae.to(torch.bfloat16)
    optimizer = Optimizer((vae.decoder if decoder_only else vae).parameters(), lr)
    begin, step, log = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - begin) / seconds) < 1:
        _, batch, frames, height, width = next(s for s in STAGES if done < s[0])
        video = window(clips, rng, frames, batch, height, width)
        decoded, mean = reconstruct(vae, video, decoder_only)
        loss = loss_of(decoded, video) + 1e-3 * mean.float().square().mean()
        loss.backward()
        optimizer.step(min(1, (step + 1) / 20) * (1.02 - done))
        step += 1
        log = loss.item() if log == 0 else 0.97 * log + 0.03 * loss.item()
        if step % 50 == 0:
            mse = (decoded.detach().float() - video.float()).square().mean().item()
            print(f"{step} {time.monotonic() - begin:.0f} s loss {log:.4f} psnr {10 * math.log10(4 / mse):.2f}", flush=True)
    optimizer.load_average()
    vae.float()


@torch.no_grad()
def set_statistics(vae: VideoVAE, clips: np.ndarray, count: int = 40) -> None:
    """latents_mean and latents_std from clips."""
    latents = []
    for clip in clips[:: max(1, len(clips) // count)]:
        video = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents.append(vae.encoder(video)[:, : vae.config.latent_channels].transpose(0, 1).flatten(1))
    values = torch.cat(latents, 1)
    vae.latents_mean.copy_(values.mean(1))
    vae.latents_std.copy_(values.std(1).clamp_min(STD_FLOOR))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-of", type=Path, help="train on the decoder of this VAE and leave its latents as they are")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    clips = np.load(args.clips, mmap_mode="r")
    vae = VideoVAE(tiny_config().vae)
    if args.decoder_of:
        vae.load_state_dict(torch.load(args.decoder_of, weights_only=True))
    else:
        initialise(vae)
    train(vae, clips, args.seconds, args.lr, args.seed, decoder_only=args.decoder_of is not None)
    if not args.decoder_of:
        set_statistics(vae, clips)
    torch.save(vae.state_dict(), args.output)


if __name__ == "__main__":
    main()

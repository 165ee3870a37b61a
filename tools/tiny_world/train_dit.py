"""Training of the tiny world's DiT: flow matching chunk by chunk, exactly as the streaming sampler calls the model.

Each chunk is denoised given the states of the chunks in its window, then committed: as it was rendered, with a little noise, or as the model
itself just predicted it, so that a stream survives its own mistakes (self-forcing).

Letters: B batch, C latent channels, T latent frames, h and w latent grid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sanawm.model.checkpoint.tiny_tokenizer import CHI_PROMPT
from sanawm.model.dit import SanaWM, TextFeatures, attention
from sanawm.model.dit.features import attend
from sanawm.model.dit.state import ChunkState
from sanawm.model.sampler import camera_features, sink_of
from sanawm.model.text import TextEncoder
from sanawm.prompt import PromptTokenizer
from sanawm.schedule import chunk_grid, window
from sanawm_kernels import ops
from tiny_world.clips import WORLD
from tiny_world.init_dit import initialise
from tiny_world.optim import Optimizer
from tiny_world.scene import PALETTES

# The four steps of the distilled sampler; half of the draws are the first one, where everything must come from memory and camera.
TIMESTEPS, WEIGHTS = (1000, 960, 889, 727), (0.5, 0.12, 0.13, 0.25)
CONTEXT_NOISE = 0.15
# Until this fraction of the time: batch, latent frames, probability of a self-forced context.
STAGES = ((0.5, 8, 7, 0.0), (0.8, 6, 10, 0.3), (2.0, 4, 13, 0.5))
PROMPTS = (
    *(palette.prompt for palette in PALETTES.values()),
    "A walk.",
    "The camera moves through an open landscape, realistic and detailed.",
    "A city street at night.",
)


def _float32_ops() -> Any:
    """The fused operations outside of autocast: their recurrences need float32."""

    def outside(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return function(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)

        return call

    return SimpleNamespace(**{name: outside(getattr(ops.NAIVE, name)) for name in ("main_gdn", "camera_gdn", "ucpe")})


FLOAT32_OPS = _float32_ops()


def _float32_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """`attend` outside of autocast: bfloat16 scores would blur the camera branch's large logits."""
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float(), v.float(), scale, mask).to(q.dtype)


@contextmanager
def mixed_precision() -> Iterator[None]:
    """bfloat16 matrix products, float32 recurrences and attention scores."""
    with torch.autocast("cpu", torch.bfloat16), ops.implementation(FLOAT32_OPS), mock.patch.object(attention, "attend", _float32_attend):
        with sdpa_kernel(SDPBackend.MATH):
            yield


@torch.no_grad()
def embed_prompts(text_folder: Path, prompts: tuple[str, ...], chi: str) -> list[tuple[Tensor, Tensor]]:
    """Embedding (1, L, E) and mask (1, L) of each prompt, without the padding, which nothing attends to."""
    tokenizer = PromptTokenizer.from_file(text_folder / "tokenizer.json", chi, WORLD.dit.text_tokens)
    encoder = TextEncoder.from_folder(text_folder, WORLD.dit.text_tokens, torch.float32)
    out = []
    for prompt in prompts:
        y, mask = encoder(*map(torch.from_numpy, tokenizer.encode(prompt)))
        out.append((y[:, mask[0]], mask[:, mask[0]]))
    return out


def rollout_losses(model: SanaWM, z: Tensor, text: TextFeatures, camera: Tensor, plucker: Tensor, self_forcing: float) -> Iterator[Tensor]:
    """The loss of each chunk in turn; latents z (B, C, T, h, w)."""
    states: dict[int, ChunkState] = {}
    grid = chunk_grid(z.shape[2])
    for chunk in grid:
        with torch.autocast("cpu", enabled=False):
            features = camera_features(model, camera, plucker, chunk.start, chunk.end)
        past = [states[i] for i in window(chunk.index)]
        clean = z[:, :, chunk.start : chunk.end]
        timestep = TIMESTEPS[int(torch.multinomial(torch.tensor(WEIGHTS), 1))]
        sigma = timestep / 1000
        noise = torch.randn_like(clean)
        x = (1 - sigma) * clean + sigma * noise
        row = torch.full((len(z), chunk.frames), float(timestep))
        first = int(chunk.start == 0)
        if first:
            x[:, :, 0], row[:, 0] = clean[:, :, 0], 0
        velocity = model(x, row, text, features, past=past)[0].float()
        yield (velocity - (noise - clean))[:, :, first:].square().mean()
        if chunk is grid[-1]:
            return
        context = clean + CONTEXT_NOISE * torch.rand(1) * torch.randn_like(clean)
        if float(torch.rand(1)) < self_forcing:
            context = (x - sigma * velocity).detach()
        if first:
            context[:, :, 0] = clean[:, :, 0]
        _, state = model(context, torch.zeros_like(row), text, features, past=past, commit=True)
        states = {i: sink_of(s) for i, s in states.items() if i in window(chunk.index + 1)}
        states[chunk.index] = state


def train(model: SanaWM, data: dict[str, Tensor], texts: list[tuple[Tensor, Tensor]], args: argparse.Namespace) -> None:
    optimizer = Optimizer(model.parameters(), args.lr, average=0.98)
    begin, step, log = time.monotonic(), 0, []
    while (done := (time.monotonic() - begin) / args.seconds) < 1:
        stage = next(s for s in STAGES if done < s[0])
        rows = torch.randint(len(data["latents"]), (stage[1],))
        frames = min(stage[2], data["latents"].shape[2])
        z, camera, plucker = (data[k][rows].float() for k in ("latents", "camera", "plucker"))
        y, mask = texts[int(torch.randint(len(texts), (1,)))]
        with mixed_precision():
            text = model.encode_text(y.expand(len(z), -1, -1), mask.expand(len(z), -1))
            losses = list(rollout_losses(model, z[:, :, :frames], text, camera[:, :frames], plucker[:, :, :frames], stage[3]))
        torch.stack(losses).mean().backward()
        norm = optimizer.step(min(1, (step + 1) / 20) * (1.02 - done))
        step += 1
        log.append([x.item() for x in losses][:2])
        if step % 10 == 0:
            mean = torch.tensor(log[-10:]).mean(0).tolist()
            print(f"{step} {time.monotonic() - begin:.0f} s loss {mean[0]:.4f} {mean[1]:.4f} gradient {norm:.2f}", flush=True)
    optimizer.load_average()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="folder of the checkpoint's text encoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parts = [torch.load(path, weights_only=True) for path in args.latents]
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    model = SanaWM(WORLD.dit)
    initialise(model, args.seed)
    texts = embed_prompts(args.text, PROMPTS, "\n".join(CHI_PROMPT))
    train(model, data, texts, args)
    torch.save(model.state_dict(), args.output)


if __name__ == "__main__":
    main()

"""The trained weights as a checkpoint folder in the official streaming layout, bfloat16.

`python -m tiny_world.write_checkpoint FOLDER [--vae FILE --dit FILE]` writes a synthetic checkpoint, whose text encoder stays random, and puts
the trained VAE and DiT in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sanawm.keys import dit_tensors, vae_tensors
from sanawm.model.checkpoint.layout import STREAMING_FILE
from sanawm.model.checkpoint.synth import synthesize
from sanawm.model.checkpoint.writers import Entry, Fill, Piece, write_safetensors, write_torch
from tiny_world.clips import WORLD

VAE_FILE = "ltx2_causal_vae/diffusion_pytorch_model.safetensors"
HEADER = "# A tiny world model in the layout of SANA-WM, trained on procedural scenes; see tools/tiny_world in the source repository.\n"
# Buffers of the official files that nothing reads and a checkpoint may omit.
_OPTIONAL = "recall_gate"


def write(folder: Path, vae: dict[str, Tensor], dit: dict[str, Tensor]) -> None:
    """Replace the weights of the synthetic checkpoint in `folder`."""
    tensors = {name: vae[name] for name in vae_tensors(WORLD.vae)}
    _replace(folder / VAE_FILE, lambda path, entries, fill: write_safetensors(path, entries, fill, {"format": "pt"}), tensors)
    tensors = {f"model.{name}": dit[name] for name in dit_tensors(WORLD.dit) if _OPTIONAL not in name}
    _replace(folder / STREAMING_FILE, lambda path, entries, fill: write_torch(path, {"generator": entries}, fill), tensors)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(HEADER + text.partition("\n")[2], encoding="utf-8")


def _replace(path: Path, writer: Callable[[Path, dict[str, Entry], Fill], None], tensors: dict[str, Tensor]) -> None:
    def fill(entry: Entry) -> Iterator[Piece]:
        yield tensors[entry.key].detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()

    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    partial.unlink(missing_ok=True)
    writer(partial, {name: Entry(name, tuple(t.shape), "bfloat16") for name, t in tensors.items()}, fill)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--dit", type=Path)
    args = parser.parse_args()
    synthesize(args.folder, WORLD, seed=0, dtype="bfloat16", overwrite=True)
    if args.vae and args.dit:
        write(args.folder, *(torch.load(path, weights_only=True) for path in (args.vae, args.dit)))


if __name__ == "__main__":
    main()

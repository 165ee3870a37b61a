"""Random tensor values with the statistics of a trained network, reproducible one tensor at a time.

A tensor depends on the seed and its name alone: numpy's Philox generator keyed by SHA-256 of both. Anything may therefore be generated
alone, in any order, in any layout, and equals what a whole checkpoint holds.

What the values imitate:

* Matrices and convolutions are normal with standard deviation 1/sqrt(fan-in), so activations keep their scale through the depth.
* Tensors that training starts at zero (`out_proj_cam`, `plucker_proj`, `plucker_embedder`, `t_conv`, …) are as large as the others: a
  mistake behind a zero would be invisible.
* Outliers, which quantization has to survive: in the transformer's and the text encoder's matrices one input channel in 512 (at least one)
  is OUTLIER_WEIGHT times larger, chosen anew for each matrix; and in all AdaLN scale rows the same one channel in 256 is OUTLIER_SCALE
  larger, so those channels of the normalised stream stand out in every block.
* Gates decay slowly, A_log in (-0.5, 0) and dt_bias in (-5, -1); short convolutions are near the identity; norm weights are near one
  (near zero for Gemma, which stores the difference from one).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

OUTLIER_WEIGHT = 6.0
OUTLIER_SCALE = 4.0
# Elements generated at once: small enough to stay in a CPU's cache, and it bounds memory.
BLOCK = 1 << 18

Array = NDArray[np.float32]
Draw = Callable[[int], Array]  # the next n values
_MODULATION_SCALE_ROWS = {6: (1, 4), 2: (1,)}


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def outlier_channels(width: int, seed: int) -> NDArray[np.int64]:
    """Sorted channels of the residual stream of that width whose AdaLN scales are outliers."""
    return np.sort(_generator(seed, f"outlier channels of {width}").choice(width, max(1, width // 256), replace=False))


def synth_blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Array]:
    """Values of the named tensor, flattened, in float32 pieces of about BLOCK elements.

    `name` is the official name of a transformer tensor, or the name of a VAE or text encoder tensor as in `sanawm.keys`.
    """
    rng = _generator(seed, name)
    last = name.rpartition(".")[2]

    def normal(mean: float, std: float) -> Iterator[Array]:
        return _pieces(math.prod(shape), lambda n: rng.standard_normal(n, np.float32) * np.float32(std) + np.float32(mean))

    def uniform(low: float, high: float) -> Iterator[Array]:
        return _pieces(math.prod(shape), lambda n: rng.random(n, np.float32) * np.float32(high - low) + np.float32(low))

    if last == "A_log":
        return uniform(-0.5, -0.01)
    if last == "dt_bias":
        return uniform(-5.0, -1.0)
    if name == "latents_std":
        return uniform(0.7, 1.3)
    if name == "latents_mean":
        return normal(0.0, 0.2)
    if name == "norm.weight" or name.endswith("layernorm.weight"):
        return normal(0.0, 0.05)
    if re.search(r"_norm(_cam)?\.weight$", name):
        return normal(1.0, 0.1)
    if last == "scale_shift_table":
        return iter([_modulation(rng, shape, seed).reshape(-1)])
    if re.search(r"\.conv_k(_cam)?\.weight$", name):
        identity = np.zeros(shape, np.float32)
        identity[..., -1] = 1.0  # the last tap is the current frame
        return iter([(identity + 0.1 * rng.standard_normal(shape, np.float32)).reshape(-1)])
    if len(shape) < 2 or last in ("pos_embed", "y_embedding"):
        return normal(0.0, 0.02)
    fan_in = math.prod(shape[1:])
    std = 1 / math.sqrt(fan_in)
    if name.startswith("t_block."):
        std *= 0.5  # six modulations of unit variance in every block would drown the residual stream
    if not name.startswith(("blocks.", "layers.")) or shape[1] < 64:
        return normal(0.0, std)
    columns = np.full(shape[1:], std, np.float32)
    columns[rng.choice(shape[1], max(1, shape[1] // 512), replace=False)] *= OUTLIER_WEIGHT
    return _rows(rng, shape[0], columns.reshape(-1))


def synth_tensor(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """The named tensor (float32) of the checkpoint with that seed; see `synth_blocks`."""
    return np.concatenate(list(synth_blocks(name, shape, seed))).reshape(shape)


def bfloat16_bits(values: Array) -> NDArray[np.uint16]:
    """bfloat16 bit patterns of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def _pieces(count: int, draw: Draw) -> Iterator[Array]:
    for start in range(0, count, BLOCK):
        yield draw(min(BLOCK, count - start))


def _rows(rng: np.random.Generator, rows: int, columns: Array) -> Iterator[Array]:
    step = max(1, BLOCK // columns.size)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        yield (rng.standard_normal((n, columns.size), np.float32) * columns).reshape(-1)


def _modulation(rng: np.random.Generator, shape: tuple[int, ...], seed: int) -> Array:
    table = 0.1 * rng.standard_normal(shape, np.float32)
    channels = outlier_channels(shape[1], seed)
    for row in _MODULATION_SCALE_ROWS[shape[0]]:
        table[row, channels] += OUTLIER_SCALE
    return table

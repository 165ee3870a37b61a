"""Mergeable statistics of activations.

Everything is counted where the activations are and nothing waits for the device before the statistics are read: a rollout on a GPU makes a
hundred thousand of these calls. All values count, none is sampled; the same operations run on every device, and only the order in which
float64 sums are added depends on it.

Shapes: M rows (tokens), K channels, R sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A magnitude's bin: its float32 exponent and four bits of its mantissa, 16 bins an octave.
_SHIFT = 19
_BINS = 1 << (31 - _SHIFT)
# Neighbouring channels count in their own copies of the histogram: most values fall into few bins, on which a GPU's threads would queue.
_COPIES = 64
# Channels whose maximum is this many times the median channel's are outliers.
OUTLIER_RATIO = 6.0
_OUTLIERS_KEPT = 16
PERCENTILE = 0.9999


@dataclass
class Moments:
    """Sums over the values of one label: count, maximum, powers 1 to 4, and a histogram of magnitudes over the logarithm.

    largest () float32, powers (4,) float64 and histogram int64 are on the device of the values.
    """

    count: int
    largest: Tensor
    powers: Tensor
    histogram: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Moments:
        powers = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(0, torch.zeros((), device=device), powers, torch.zeros(_BINS, dtype=torch.int64, device=device))

    def add(self, x_MK: Tensor, largest: Tensor) -> None:
        """Count the values of x, whose largest magnitude is `largest` (). Values that are not finite spoil the sums and nothing else."""
        x = x_MK.float()
        self.count += x.numel()
        self.largest = torch.maximum(self.largest, largest.float())
        square = x.square()
        self.powers += torch.stack([s.sum(dtype=torch.float64) for s in (x, square, square * x, square * square)])
        self.histogram += _histogram(x)

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.largest = torch.maximum(self.largest, other.largest)
        self.powers += other.powers
        self.histogram += other.histogram

    @property
    def amax(self) -> float:
        return float(self.largest)

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.powers[1]) / self.count)

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment: 3 for a normal distribution, large for heavy tails; 0 for a constant.

        Good to three digits while the mean is under ten times the spread.
        """
        m1, m2, m3, m4 = (float(p) / self.count for p in self.powers)
        variance = m2 - m1**2
        if variance <= 1e-12 * m2:
            return 0.0
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2

    def percentile(self, share: float = PERCENTILE) -> float:
        """The magnitude under which that share of the values lies, to a sixteenth of an octave."""
        total = self.histogram.cumsum(0)
        edge = int(torch.searchsorted(total, torch.tensor(math.ceil(share * self.count)))) + 1
        return min(self.amax, float(torch.tensor(edge << _SHIFT, dtype=torch.int32).view(torch.float32)))

    def summary(self) -> dict[str, Any]:
        return {"count": self.count, "amax": self.amax, "p99.99": self.percentile(), "rms": self.rms, "kurtosis": self.kurtosis}


def _histogram(x_MK: Tensor) -> Tensor:
    """How many magnitudes of x (float32) fall into each bin, (_BINS,) int64."""
    copy_K = torch.arange(x_MK.shape[1], dtype=torch.int32, device=x_MK.device) % _COPIES
    bins = (x_MK.abs().view(torch.int32) >> _SHIFT).mul_(_COPIES).add_(copy_K)
    counts = torch.zeros(_BINS * _COPIES, dtype=torch.int32, device=x_MK.device)
    counts.scatter_add_(0, bins.flatten().long(), torch.ones_like(counts[:1]).expand(bins.numel()))
    return counts.view(_BINS, _COPIES).sum(1)


class SourceStatistics:
    """Statistics of one activation tensor over many evaluations: per label (timestep or pass), per channel, and a sample of rows."""

    def __init__(self, channels: int, rows: int, seed: int, device: torch.device | str = "cpu") -> None:
        """`rows` is how many rows the sample holds; which ones depends on the seed and the order of `add`."""
        self.labels: dict[str, Moments] = {}
        self.channel_amax = torch.zeros(channels, device=device)
        self.channel_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.channel_rows = 0
        self.rows = torch.empty(0, channels, dtype=torch.bfloat16, device=device)
        self._keys = torch.empty(0)
        self._size = rows
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, label: str) -> Tensor:
        """Count the values of x (..., K) under a label. Returns their largest magnitude (), not finite where a value is not."""
        x_MK = x.detach().reshape(-1, x.shape[-1])
        magnitude = x_MK.abs()
        amax_K = magnitude.amax(0).float()
        largest = amax_K.amax()
        if label not in self.labels:
            self.labels[label] = Moments.empty(x.device)
        self.labels[label].add(x_MK, largest)
        self.channel_amax = torch.maximum(self.channel_amax, amax_K)
        self.channel_sum += magnitude.sum(0, dtype=torch.float64)
        self.channel_rows += x_MK.shape[0]
        self._sample(x_MK)
        return largest

    def _sample(self, x_MK: Tensor) -> None:
        # Every row gets a random key; the rows with the smallest keys form a uniform sample of all that came by. Keys are the CPU's, so
        # which rows to take is known without waiting for them.
        keys = torch.rand(x_MK.shape[0], generator=self._generator)
        worst = float(self._keys.max()) if len(self._keys) == self._size and self._size else math.inf
        (candidates,) = torch.nonzero(keys < worst, as_tuple=True)
        if not len(candidates):
            return
        all_keys = torch.cat((self._keys, keys[candidates]))
        kept = torch.topk(all_keys, min(self._size, len(all_keys)), largest=False).indices.sort().values
        old = kept[kept < len(self._keys)]
        new = candidates[kept[kept >= len(self._keys)] - len(self._keys)]
        old, new = (index.to(x_MK.device, non_blocking=True) for index in (old, new))
        self.rows = torch.cat((self.rows[old], x_MK[new].bfloat16()))
        self._keys = all_keys[kept]

    @property
    def amax(self) -> float:
        return float(self.channel_amax.amax())

    @property
    def channel_mean(self) -> Tensor:
        """Mean magnitude of each channel, (K,) float32."""
        return (self.channel_sum / max(1, self.channel_rows)).float()

    def outliers(self) -> list[tuple[int, float]]:
        """(channel, its maximum over the median channel's) of the largest outlier channels, largest first."""
        median = float(self.channel_amax.median())
        if median == 0:
            return []
        ratio = self.channel_amax / median
        top = torch.topk(ratio, min(_OUTLIERS_KEPT, len(ratio)))
        return [(int(i), float(r)) for r, i in zip(top.values, top.indices) if r >= OUTLIER_RATIO]

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the random state, by name, on the CPU."""
        found = {
            "channel_amax": self.channel_amax,
            "channel_sum": self.channel_sum,
            "channel_rows": torch.tensor(self.channel_rows),
            "rows": self.rows.contiguous(),
        }
        for label, m in self.labels.items():
            found |= {
                f"{label}/count": torch.tensor(m.count),
                f"{label}/amax": m.largest.double(),
                f"{label}/powers": m.powers,
                f"{label}/histogram": m.histogram,
            }
        return {name: tensor.cpu() for name, tensor in found.items()}


def restore(tensors: Mapping[str, Tensor]) -> SourceStatistics:
    """Statistics from `SourceStatistics.tensors`, ready to merge."""
    found = SourceStatistics(len(tensors["channel_amax"]), 0, 0)
    found.channel_amax, found.channel_sum = tensors["channel_amax"], tensors["channel_sum"]
    found.channel_rows, found.rows = int(tensors["channel_rows"]), tensors["rows"]
    for label in dict.fromkeys(name.partition("/")[0] for name in tensors if "/" in name):
        part = {key: tensors[f"{label}/{key}"] for key in ("count", "amax", "powers", "histogram")}
        found.labels[label] = Moments(int(part["count"]), part["amax"].float(), part["powers"].clone(), part["histogram"].clone())
    return found


def merge(parts: Iterable[SourceStatistics]) -> SourceStatistics:
    """Statistics of all parts together; the samples follow each other."""
    first, *others = parts
    total = restore(first.tensors())
    for part in others:
        for label, moments in part.labels.items():
            total.labels.setdefault(label, Moments.empty()).merge(moments)
        total.channel_amax = torch.maximum(total.channel_amax, part.channel_amax)
        total.channel_sum = total.channel_sum + part.channel_sum
        total.channel_rows += part.channel_rows
        total.rows = torch.cat((total.rows, part.rows))
    return total

"""Mergeable statistics of activations.

Shapes: M rows (tokens), K channels, R sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A magnitude's bin: its float32 exponent and four bits of its mantissa, 16 bins an octave.
_SHIFT = 19
_BINS = 1 << (31 - _SHIFT)
# Channels whose maximum is this many times the median channel's are outliers.
OUTLIER_RATIO = 6.0
_OUTLIERS_KEPT = 16
PERCENTILE = 0.9999


@dataclass
class Moments:
    """Sums over the values of one label: count, maximum, powers 1 to 4, and a histogram of magnitudes over the logarithm."""

    count: int = 0
    amax: float = 0.0
    powers: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    histogram: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def add(self, x_MK: Tensor) -> None:
        """Count the values of x, which are finite."""
        x = x_MK.float().flatten()
        self.count += x.numel()
        self.amax = max(self.amax, float(x.abs().amax()))
        square = x.square()
        sums = torch.stack([s.sum(dtype=torch.float64) for s in (x, square, square * x, square * square)])
        self.powers += sums.cpu()
        self.histogram += torch.bincount(x.abs().view(torch.int32) >> _SHIFT, minlength=_BINS).cpu()

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.amax = max(self.amax, other.amax)
        self.powers += other.powers
        self.histogram += other.histogram

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.powers[1]) / self.count)

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment: 3 for a normal distribution, large for heavy tails; 0 for a constant."""
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


class SourceStatistics:
    """Statistics of one activation tensor over many evaluations: per label (timestep or pass), per channel, and a sample of rows."""

    def __init__(self, channels: int, rows: int, seed: int) -> None:
        """`rows` is how many rows the sample holds; which ones depends on the seed and the order of `add`."""
        self.labels: dict[str, Moments] = {}
        self.channel_amax = torch.zeros(channels)
        self.channel_sum = torch.zeros(channels, dtype=torch.float64)
        self.channel_rows = 0
        self.rows = torch.empty(0, channels, dtype=torch.bfloat16)
        self._keys = torch.empty(0)
        self._size = rows
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, label: str) -> None:
        """Count the values of x (..., K) under a label; x is finite."""
        x_MK = x.detach().reshape(-1, x.shape[-1])
        self.labels.setdefault(label, Moments()).add(x_MK)
        magnitude = x_MK.abs()
        self.channel_amax = torch.maximum(self.channel_amax, magnitude.amax(0).float().cpu())
        self.channel_sum += magnitude.sum(0, dtype=torch.float64).cpu()
        self.channel_rows += x_MK.shape[0]
        self._sample(x_MK)

    def _sample(self, x_MK: Tensor) -> None:
        # Every row gets a random key; the rows with the smallest keys form a uniform sample of all that came by.
        keys = torch.rand(x_MK.shape[0], generator=self._generator)
        worst = float(self._keys.max()) if len(self._keys) == self._size and self._size else math.inf
        (candidates,) = torch.nonzero(keys < worst, as_tuple=True)
        all_keys = torch.cat((self._keys, keys[candidates]))
        kept = torch.topk(all_keys, min(self._size, len(all_keys)), largest=False).indices.sort().values
        old = kept[kept < len(self._keys)]
        new = candidates[kept[kept >= len(self._keys)] - len(self._keys)]
        self.rows = torch.cat((self.rows[old], x_MK[new.to(x_MK.device)].to("cpu", torch.bfloat16)))
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
        """Everything but the random state, by name."""
        found = {
            "channel_amax": self.channel_amax,
            "channel_sum": self.channel_sum,
            "channel_rows": torch.tensor(self.channel_rows),
            "rows": self.rows.contiguous(),
        }
        for label, m in self.labels.items():
            found |= {
                f"{label}/count": torch.tensor(m.count),
                f"{label}/amax": torch.tensor(m.amax, dtype=torch.float64),
                f"{label}/powers": m.powers,
                f"{label}/histogram": m.histogram,
            }
        return found


def restore(tensors: Mapping[str, Tensor]) -> SourceStatistics:
    """Statistics from `SourceStatistics.tensors`, ready to merge."""
    found = SourceStatistics(len(tensors["channel_amax"]), 0, 0)
    found.channel_amax, found.channel_sum = tensors["channel_amax"], tensors["channel_sum"]
    found.channel_rows, found.rows = int(tensors["channel_rows"]), tensors["rows"]
    for label in dict.fromkeys(name.partition("/")[0] for name in tensors if "/" in name):
        part = {key: tensors[f"{label}/{key}"] for key in ("count", "amax", "powers", "histogram")}
        found.labels[label] = Moments(int(part["count"]), float(part["amax"]), part["powers"].clone(), part["histogram"].clone())
    return found


def merge(parts: Iterable[SourceStatistics]) -> SourceStatistics:
    """Statistics of all parts together; the samples follow each other."""
    first, *others = parts
    total = restore(first.tensors())
    for part in others:
        for label, moments in part.labels.items():
            total.labels.setdefault(label, Moments()).merge(moments)
        total.channel_amax = torch.maximum(total.channel_amax, part.channel_amax)
        total.channel_sum = total.channel_sum + part.channel_sum
        total.channel_rows += part.channel_rows
        total.rows = torch.cat((total.rows, part.rows))
    return total

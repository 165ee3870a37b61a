"""Search of NVFP4 block scales for the least squared error.

The definition tries all 126 positive e4m3 scales for every block of 16. Most cannot win, and leaving them out changes no choice:

* From a step of four times the block's maximum on, every element rounds to zero, so all those scales have the same error, and the first
  one counts.
* At a step s under amax / 24 the largest element alone is off by (amax - 6 s)^2 > 0.56 amax^2. The next e4m3 number above amax / 6 is at
  most 1.125 times larger, which bounds the error of all 16 elements together by 15.45 (1.125 / 6)^2 amax^2 = 0.54 amax^2. Among e4m3's
  subnormal numbers, which lie further apart, nothing is left out.

Shapes: J blocks of 16 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sanawm_kernels.quant.formats import E2M1_MAX, E4M3_MAX

# e4m3 codes 1..126, the positive finite numbers in ascending order; codes 1..7 are subnormal, eight codes an octave.
_LAST_CODE = 126
_SUBNORMAL_REACH = 16
# Blocks at a time: the working set of 64 Ki elements stays in a core's cache.
_CHUNK = 4096
# Under this maximum modelopt takes 1 instead.
_SMALLEST_AMAX = 2.0**-24


def _values(device: torch.device) -> Tensor:
    """The e4m3 numbers of codes 0..126, float32."""
    return torch.arange(_LAST_CODE + 1, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def round_magnitude(y: Tensor) -> Tensor:
    """Numbers y >= 0 rounded to e2m1 magnitudes, nearest even, saturating at 6. Float32, same shape."""
    # The spacing is 0.5 under 2, 1 under 4, 2 above: half the power of two below y, within bounds.
    spacing = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0).mul_(0.5)
    return torch.round(y / spacing).mul_(spacing).clamp_max_(E2M1_MAX)


def best_block_amax(x_J16: Tensor, global_amax: Tensor) -> Tensor:
    """Block maxima (J,) float32 under which rounding x to NVFP4 has the least squared error: global_amax times an e4m3 number over 448.

    x (J, 16) float32, global_amax (). The choice of modelopt's 126-candidate sweep, ties included.
    """
    values = _values(x_J16.device)
    top = global_amax.float() / E2M1_MAX
    unit = 1 / (E4M3_MAX / torch.where(top <= _SMALLEST_AMAX, torch.ones_like(top), top))
    codes = torch.cat([_best_codes(part, values, unit) for part in x_J16.split(_CHUNK)])
    return global_amax.float() * (values / E4M3_MAX)[codes]


def _best_codes(x_J16: Tensor, values: Tensor, unit: Tensor) -> Tensor:
    magnitude = x_J16.abs()
    amax = magnitude.amax(1)

    def code_above(step: Tensor) -> Tensor:
        return torch.searchsorted(values, step / unit).clamp(1, _LAST_CODE)

    first = code_above(amax / 24)
    first = torch.where(code_above(amax / E2M1_MAX) < _SUBNORMAL_REACH, torch.ones_like(first), first)
    last = code_above(amax * 4)
    best = torch.full_like(amax, torch.inf)
    chosen = first.clone()
    for offset in range(int((last - first).max()) + 1):
        code = (first + offset).clamp_max(_LAST_CODE)
        step = (values[code] * unit).unsqueeze(1)
        error = ((round_magnitude(magnitude / step) * step).sub_(magnitude)).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, code, chosen)
    return chosen

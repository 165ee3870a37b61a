"""Static scales of activations and FP8 weights: powers of two.

A power of two divides and multiplies without rounding, so a scale is the same number in float32 and bfloat16 graphs, and fake quantization, the
exported graph and a kernel that multiplies by the reciprocal agree to the last bit. e4m3 loses nothing by it: its relative precision is the
same at every power of two.

Shapes: none; everything is a scalar.
"""

from __future__ import annotations

import math

from sanawm_calibration.errors import CalibrationError
from sanawm_kernels.quant.formats import E2M1_MAX, E4M3_MAX

# Room above the calibrated maximum, for inputs that calibration did not see. It costs nothing while what matters stays clear of e4m3's
# subnormal numbers (0.1 dB at x512 of the maximum for NVFP4 and x64 for FP8 on the synthetic families), and clipping costs much: 1 to 6 dB
# for NVFP4 and 7 to 15 dB for FP8 at half the maximum.
NVFP4_HEADROOM = 8.0
FP8_HEADROOM = 4.0


def _power_of_two(value: float, what: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise CalibrationError(f"{what}: the calibrated maximum is {value:g}, and a scale needs a positive finite one; calibrate again")
    return 2.0 ** math.ceil(math.log2(value))


def fp8_scale(amax: float, what: str, headroom: float = FP8_HEADROOM) -> float:
    """The least power of two under which `headroom` times `amax` does not saturate e4m3. `what` names the tensor in errors."""
    return _power_of_two(amax * headroom / E4M3_MAX, what)


def nvfp4_scale(amax: float, what: str, headroom: float = NVFP4_HEADROOM) -> float:
    """The least power of two for the global scale of NVFP4 activations under which `headroom` times `amax` does not saturate."""
    return _power_of_two(amax * headroom / (E2M1_MAX * E4M3_MAX), what)


def limit(scale: float, nvfp4: bool) -> float:
    """Largest magnitude that a static scale represents; more is clipped."""
    return scale * E4M3_MAX * (E2M1_MAX if nvfp4 else 1)

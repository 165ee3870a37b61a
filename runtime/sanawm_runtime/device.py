"""Which GPU this machine has, asked of the driver alone."""

from __future__ import annotations

import ctypes
import sys

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def device_capability(index: int = 0) -> str | None:
    """Compute capability of a GPU as "sm_120", or None where there is no NVIDIA driver or no such device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0):
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    parts = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        parts.append(str(value.value))
    return "sm_" + "".join(parts)

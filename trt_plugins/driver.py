# SPDX-License-Identifier: Apache-2.0
"""What the NVIDIA driver of this machine takes, asked of the driver itself; no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA whose programs the driver starts, such as (12, 6), or None without a driver.

    A program of an older major version starts too, and one of the same major version with any minor number, except
    that code for a GPU that it does not name needs the driver's own version or an older one.
    """
    driver = _driver()
    number = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)) or number.value <= 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def architectures() -> tuple[int, ...]:
    """Compute capabilities of this machine's GPUs times ten, such as (87,); empty where the driver sees none."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = set()
    for index in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        if (
            driver.cuDeviceGet(ctypes.byref(device), index) == 0
            and driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device) == 0
            and driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device) == 0
        ):
            found.add(10 * major.value + minor.value)
    return tuple(sorted(found))

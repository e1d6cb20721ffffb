# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has an NVIDIA GPU that can be used, asked of the driver itself."""

from __future__ import annotations

import ctypes
import sys


def gpu_problem() -> str:
    """What is wrong where the NVIDIA driver sees no GPU, else empty. Needs the driver only, no CUDA toolkit."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return "no NVIDIA driver is installed here"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit returned {code})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the NVIDIA driver sees no GPU"
    return ""

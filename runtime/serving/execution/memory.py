# SPDX-License-Identifier: Apache-2.0
"""The C library's settings for memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BLOCK = 4 << 20
_KEPT = 16 << 20  # at the end of a heap, so that small images need nothing from the system


def return_freed_memory() -> None:
    """Let freed memory go back to the system at once, with glibc.

    By default, glibc keeps blocks of up to 32 MiB for later, once one of them has been freed, and a heap for each
    thread: after a burst of large images a service would hold most of the memory that the burst took.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_ARENA_MAX, 2)

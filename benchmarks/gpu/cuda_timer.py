# SPDX-License-Identifier: Apache-2.0
"""One timer for every kernel: many launches in one CUDA graph, so that neither Python nor a launch is measured.

Cold: the launches go round enough sets of operands that none finds its own in the L2 cache. Warm: all have the same
operands, as in a network, where the layer before has just written them. A network lies between the two.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prediction import Gpu

from internimage_deploy.timing import Timing, summary

LAUNCHES = 50  # at least, in a graph
MOST_LAUNCHES = 400
REPLAYS = 25
MOST_BYTES = 8 << 30  # of operands that a cold measurement goes round

Call = Callable[[], object]
"""Enqueues work on PyTorch's current stream, and does not wait."""

# CUdevice_attribute
_CLOCK_KHZ, _MULTIPROCESSORS, _L2_BYTES = 13, 16, 38


@dataclass(frozen=True)
class Sets:
    """How many sets of operands a cold measurement needs, and how many launches its graph holds."""

    count: int
    launches: int


def plan_sets(bytes_per_set: int, l2_bytes: int, launches: int = LAUNCHES) -> Sets:
    """As many sets as hold twice the L2 cache together, at least two; every set is launched equally often."""
    wanted = max(2, math.ceil(2 * l2_bytes / max(1, bytes_per_set)))
    count = max(1, min(wanted, MOST_LAUNCHES, MOST_BYTES // max(1, bytes_per_set)))
    return Sets(count, count * math.ceil(launches / count))


class CudaTimer:
    """Times calls on one GPU, that of PyTorch."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.l2_bytes = attribute(_L2_BYTES)

    def time(self, calls: Sequence[Call], *, launches: int = LAUNCHES, replays: int = REPLAYS) -> Timing:
        """Milliseconds of one call, over replays of a graph of `launches` of them, which take turns.

        Raises:
            RuntimeError: a call cannot be captured into a CUDA graph, or fails.
        """
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:3]:
                call()  # loads the module, and allocates what PyTorch keeps
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for index in range(launches):
                calls[index % len(calls)]()
        with torch.cuda.stream(stream):
            for _ in range(3):
                graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
        torch.cuda.synchronize()
        times = [first.elapsed_time(second) / launches for first, second in itertools.pairwise(marks)]
        return summary([float(time) for time in times])

    def cold_and_warm(self, calls: Sequence[Call], launches: int) -> dict[str, float]:
        """Times of a call, of which there is one over each of the sets of operands that `plan_sets` wants.

        Returns:
            Microseconds: median and 95th percentile, `cold_us`, `cold_p95_us`, `warm_us` and `warm_p95_us`.
        """
        found = {}
        for name, chosen in (("cold", calls), ("warm", calls[:1])):
            timing = self.time(chosen, launches=launches)
            found |= {f"{name}_us": micro(timing.median_ms), f"{name}_p95_us": micro(timing.p95_ms)}
        return found

    def launch_us(self) -> float:
        """Microseconds of a kernel that does nothing to speak of: the least that a launch in a graph can take."""
        one = self._torch.zeros(1, device="cuda")
        return micro(self.time([lambda: one.add_(1)]).median_ms)

    def copy_bytes_per_s(self, gibibytes: float = 1.0) -> float:
        """Bytes per second, read plus written, of a large copy in the GPU's memory."""
        source = self._torch.empty(int(gibibytes * 2**30), dtype=self._torch.int8, device="cuda").zero_()
        target = self._torch.empty_like(source)
        timing = self.time([lambda: target.copy_(source)], launches=5, replays=10)
        return 2 * source.numel() / (timing.median_ms * 1e-3)

    def gpu(self) -> Gpu:
        """What predictions ask, measured and read from the driver."""
        return Gpu(attribute(_MULTIPROCESSORS), 1e3 * attribute(_CLOCK_KHZ), self.copy_bytes_per_s())


def micro(milliseconds: float) -> float:
    """Microseconds with four significant digits, for a report."""
    return float(f"{1e3 * milliseconds:.4g}")


def attribute(code: int, device: int = 0) -> int:
    """An attribute of a GPU, asked of the driver (`cuDeviceGetAttribute`)."""
    driver: Any = ctypes.CDLL("libcuda.so.1")
    value, handle = ctypes.c_int(0), ctypes.c_int(0)
    for status in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(handle), device),
        driver.cuDeviceGetAttribute(ctypes.byref(value), code, handle),
    ):
        if status:
            raise RuntimeError(f"the NVIDIA driver answers {status} when asked for attribute {code}")
    return value.value

# SPDX-License-Identifier: Apache-2.0
"""One timer for every kernel: warm-up, CUDA events around each call, a cold L2 cache, median and 95th percentile."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from internimage_deploy.timing import Timing, summary


class CudaTimer:
    """Times callables on the current CUDA stream.

    Before each call a buffer twice the size of L2 is overwritten, so that operands come from memory, as they do in a
    network whose other layers ran in between.
    """

    def __init__(self, warmup_ms: float = 50.0, measure_ms: float = 300.0) -> None:
        import torch

        self._torch = torch
        self.warmup_ms, self.measure_ms = warmup_ms, measure_ms
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(2 * l2, 1 << 20), dtype=torch.int8, device="cuda")

    def _events(self, call: Callable[[], object], count: int) -> list[float]:
        torch = self._torch
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def __call__(self, call: Callable[[], object]) -> Timing:
        """Time `call`, which enqueues work on the current stream and does not synchronise."""
        call()
        estimate = max(statistics.median(self._events(call, 3)), 1e-3)
        self._events(call, max(3, int(self.warmup_ms / estimate)))
        return summary(self._events(call, min(2000, max(20, int(self.measure_ms / estimate)))))

    def copy_bandwidth(self, gibibytes: float = 1.0) -> float:
        """Bytes per second, read plus written, of a large copy in device memory."""
        torch = self._torch
        source = torch.empty(int(gibibytes * 2**30), dtype=torch.int8, device="cuda").zero_()
        target = torch.empty_like(source)
        timing = self(lambda: target.copy_(source))
        return 2 * source.numel() / (timing.median_ms * 1e-3)

# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: several calls measured in turns, so that other load on the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

UNSTABLE_ABOVE = 0.1  # coefficient of variation


@dataclass(frozen=True)
class Timing:
    """Statistics of repeated runs.

    `cpu_ms` is the smallest processor time of a run, summed over threads: other programs hardly affect it.
    """

    runs: int
    median_ms: float
    p95_ms: float
    min_ms: float
    cv: float  # standard deviation / mean
    cpu_ms: float

    @property
    def unstable(self) -> bool:
        """True when the runs differ so much that their median says little."""
        return self.cv > UNSTABLE_ABOVE

    def asdict(self) -> dict[str, float]:
        """Plain data for a JSON report, with six significant digits, for a kernel may take microseconds."""
        short = {key: value if key == "runs" else float(f"{value:.6g}") for key, value in asdict(self).items()}
        return {**short, "unstable": self.unstable}


def measure(
    calls: Mapping[str, Callable[[], object]], *, runs: int = 10, warmup: int = 2, seconds: float = float("inf")
) -> dict[str, Timing]:
    """Time each of `calls`, in turns.

    Args:
        calls: by name, what is timed.
        runs: number of timed calls of each.
        warmup: number of calls of each before those, which do not count.
        seconds: stop after the round in which this much time has passed, with at least three rounds.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for index in range(runs):
        for name, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
        if index >= 2 and time.perf_counter() - begun > seconds:
            break
    return {name: summary(wall[name], min(cpu[name])) for name in calls}


def summary(times_ms: list[float], cpu_ms: float = 0.0) -> Timing:
    """The statistics of `times_ms`; `cpu_ms` is passed on."""
    ordered = sorted(times_ms)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    mean = statistics.fmean(ordered)
    deviation = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    return Timing(len(ordered), statistics.median(ordered), p95, ordered[0], deviation / mean if mean else 0.0, cpu_ms)

# SPDX-License-Identifier: Apache-2.0
"""What a kernel should take, from counted bytes and instructions: printed beside every measured time.

Three times, the largest of which is the prediction:

- copy: every operand read or written once, at the bandwidth of a large copy;
- gather: the bytes that threads load from the L1 cache, at 128 bytes per clock and multiprocessor;
- issue: the instructions of all threads, at 128 per clock and multiprocessor.

It leaves out latency, which is what small launches consist of, and the launch itself.
"""

from __future__ import annotations

from dataclasses import dataclass

L1_BYTES_PER_CLOCK = 128  # of one multiprocessor
LANES = 128  # instructions of single threads that one multiprocessor issues per clock

# Instructions that a thread executes away from the image's border, of a 3x3 DCNv3 in float16 on sm_90: (body, accesses
# per thread of 8 channels each, softmax) -> instructions. The branching kernels were counted along that path in the
# disassembly, and the softmax is 67 to 104 of them; the others have one path, and docs/plugin.md has their counts per
# channel. Kernels of other types have not been counted.
DCNV3_FLOAT16 = {
    ("branching", 1, False): 1112,
    ("branching", 2, False): 1734,
    ("branching", 1, True): 1112 + 85,
    ("branching", 2, True): 1734 + 85,
    ("branch-free", 1, True): 182 * 8,
    ("branch-free", 2, True): 130 * 16,
    ("branch-free", 4, True): 104 * 32,
    ("half", 1, True): 147 * 8,
    ("half", 2, True): 94 * 16,
    ("half", 4, True): 68 * 32,
}
# The same, per channel, of the kernels that it is compared with.
CANDIDATES_PER_CHANNEL = {"official": 1080.0, "dcnv4": 220.0}


@dataclass(frozen=True)
class Gpu:
    """What the prediction asks of a GPU."""

    multiprocessors: int
    clock_hz: float
    copy_bytes_per_s: float  # read plus written


@dataclass(frozen=True)
class Work:
    """What one launch does. `instructions` are those of all threads, None where nobody has counted them."""

    bytes_moved: int
    bytes_gathered: int = 0
    instructions: float | None = None


def predict(work: Work, gpu: Gpu) -> dict[str, float | str]:
    """`copy_us`, `gather_us`, `issue_us` if it is known, the largest as `predicted_us`, and its name as `bound`."""
    per_second = gpu.multiprocessors * gpu.clock_hz
    parts = {
        "copy": work.bytes_moved / gpu.copy_bytes_per_s,
        "gather": work.bytes_gathered / (per_second * L1_BYTES_PER_CLOCK),
    }
    if work.instructions is not None:
        parts["issue"] = work.instructions / (per_second * LANES)
    bound = max(parts, key=lambda name: parts[name])
    times = {f"{name}_us": round(1e6 * seconds, 2) for name, seconds in parts.items()}
    return {**times, "predicted_us": times[f"{bound}_us"], "bound": bound}

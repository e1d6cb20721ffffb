# SPDX-License-Identifier: Apache-2.0
"""Every tactic of every kernel once, without PyTorch, for NVIDIA's tools to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu/probe.py --capability 9.0
    ncu --set full python benchmarks/gpu/probe.py --capability 9.0 --layer

The shapes are small, with borders and wild offsets among them; --layer runs the first layers of InternImage-T instead,
the default tactic and one of each kind. Results are not looked at: correctness.py does that. Exit code 1: a launch
failed.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator

import clone  # noqa: F401  # first: it finds the others
import numpy as np
from kernel_library import load_kernel

from internimage_deploy.trt_plugins.host_operators import DTYPES, MsDeformAttnParams, Params, UpsampleArgmaxParams

# One of each body and number of accesses, with tiles of 128 threads; 0 is the default. See grid.h.
LAYER_TACTICS = (0, 4, 10, 17, 20, 25, 28)
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Memory:
    """Device memory with random finite bytes, or nothing written yet; each allocation on its own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._taken: list[int] = []

    def filled(self, values: np.ndarray) -> int:
        """The address of a copy of `values`."""
        values = np.ascontiguousarray(values)
        address = self.empty(values.nbytes)
        if self._library.device_upload(address, values.ctypes.data, values.nbytes):
            raise RuntimeError("the copy to the GPU failed")
        return address

    def empty(self, nbytes: int) -> int:
        """The address of memory that nothing was written to."""
        address = self._library.device_alloc(nbytes)
        if not address:
            raise RuntimeError(f"the GPU has no {nbytes} bytes left")
        self._taken.append(address)
        return int(address)

    def free(self) -> None:
        """Free everything."""
        while self._taken:
            self._library.device_free(self._taken.pop())


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values in the storage of `dtype`; bfloat16 by cutting, as 16-bit integers."""
    values = values.astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def dcnv3(memory: Memory, dtype: str, channels: int, layer: bool, softmax: bool) -> Params:
    """A parameter block: a small map with a border of wild offsets, or stage 1 of InternImage-T at batch 8."""
    batch, height, width, groups = (8, 128, 128, 4) if layer else (2, 7, 5, 3)
    rng, pixels, depth = np.random.default_rng(0), batch * height * width, groups * channels
    offset = 2 * rng.standard_normal((pixels, groups * 18), np.float32)
    if not layer:
        offset[::5], offset[1::7], offset[2::9] = np.inf, np.nan, -6e4
    params = Params(
        batch=batch, height=height, width=width, out_height=height, out_width=width, groups=groups,
        group_channels=channels, offset_scale=1.0, mask_softmax=int(softmax), allow_half=1,
    )  # fmt: skip
    for name in ("kernel", "stride", "pad", "dilation"):
        for side in "hw":
            setattr(params, f"{name}_{side}", 3 if name == "kernel" else 1)
    for name, width_of in (("input", depth), ("offset", groups * 18), ("mask", groups * 9), ("output", depth)):
        values = offset if name == "offset" else rng.standard_normal((pixels, width_of), np.float32)
        content = stored(values, dtype)
        setattr(params, name, memory.empty(content.nbytes) if name == "output" else memory.filled(content))
        strides = getattr(params, f"{name}_strides")
        strides.image, strides.row, strides.pixel = height * width * width_of, width * width_of, width_of
    return params


def ms_deform_attn(memory: Memory, dtype: str, channels: int) -> MsDeformAttnParams:
    """A parameter block over three small maps, with wild locations."""
    maps = np.array([(2, 3), (5, 4), (7, 9)], np.int32)
    cells, queries, heads, points = maps.prod(1), 21, 2, 4
    rng, places = np.random.default_rng(0), (2, queries, heads, len(maps), points)
    locations = 0.5 + rng.standard_normal((*places, 2), np.float32)
    locations[:, ::5], locations[:, 1::7] = np.inf, np.nan
    params = MsDeformAttnParams(
        batch=2, keys=int(cells.sum()), queries=queries, heads=heads, head_channels=channels, levels=len(maps),
        points=points,
    )  # fmt: skip
    arrays = {
        "value": stored(rng.standard_normal((2, cells.sum(), heads, channels), np.float32), dtype),
        "spatial_shapes": maps,
        "level_start_index": (cells.cumsum() - cells).astype(np.int32),
        "sampling_locations": locations,
        "attention_weights": stored(rng.random(places, np.float32), dtype),
    }
    for name, values in arrays.items():
        setattr(params, name, memory.filled(values))
    params.output = memory.empty(2 * queries * heads * channels * SIZES[dtype])
    return params


def upsample_argmax(memory: Memory, dtype: str, classes: int) -> UpsampleArgmaxParams:
    """A parameter block over a map of odd size."""
    batch, height, width = 2, 7, 5
    logits = np.random.default_rng(0).standard_normal((batch, classes, height, width), np.float32)
    labels = memory.empty(4 * batch * 4 * height * 4 * width)
    return UpsampleArgmaxParams(memory.filled(stored(logits, dtype)), labels, batch, classes, height, width)


def blocks(memory: Memory, dtype: str, channels: int, layer: bool) -> Iterator[tuple[str, ctypes.Structure]]:
    """Names of kernels with a parameter block each; one layer of a network, or every kernel."""
    yield "dcnv3", dcnv3(memory, dtype, channels, layer, softmax=True)
    if layer:
        return
    yield "dcnv3", dcnv3(memory, dtype, channels, layer, softmax=False)
    yield "ms_deform_attn", ms_deform_attn(memory, dtype, channels)
    yield "upsample_argmax", upsample_argmax(memory, dtype, channels)


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", required=True, help="of the GPU, such as 9.0")
    parser.add_argument("--layer", action="store_true", help="a layer of InternImage-T in float16")
    options = parser.parse_args()
    library = load_kernel(options.capability)
    memory, failed, launches = Memory(library), 0, 0
    for dtype in ("float16",) if options.layer else SIZES:
        for channels in (16,) if options.layer else (16, 32, 24, 12, 6, 5):
            for name, params in blocks(memory, dtype, channels, options.layer):
                for tactic in LAYER_TACTICS if options.layer else range(library.dcnv3_tactics() + 1):
                    function = getattr(library, f"{name}_launch")
                    status = function(ctypes.byref(params), DTYPES.index(dtype), tactic, None)
                    status = status or library.device_synchronize()
                    launches += 1
                    if status:
                        failed += 1
                        print(f"{name} {dtype} {channels} channels, tactic {tactic}: CUDA error {status}")
            memory.free()
    print(f"{launches} launches, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

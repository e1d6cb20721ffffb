# SPDX-License-Identifier: Apache-2.0
"""The header of a `.safetensors` file: JSON that says where each tensor lies.

A file is the header's length as 8 bytes, the header, and the tensors' bytes. The header maps a name to {"dtype",
"shape", "data_offsets": [begin, end]}, counted from the header's end; `__metadata__` maps text to text.
"""

from __future__ import annotations

import json
import math
from mmap import mmap

import torch

from internimage_deploy.errors import quoted
from internimage_deploy.exporter.pickle_literals import Damaged
from internimage_deploy.exporter.rebuild import StorageRef, StoredTensor

_MAX_HEADER = 25_000_000  # bytes; the largest model's has some 500,000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Location = tuple[int, int]


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` is one."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def read_header(data: bytes | mmap) -> tuple[dict[object, object], dict[str, Location]]:
    """The tensors by name, and (first byte, number of bytes) of each in the file.

    Raises:
        Damaged: the header is not what the format says.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
        raise Damaged(f"its header is to have {length:,} bytes")
    try:
        header = json.loads(data[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise Damaged("its header is no JSON") from error
    if not isinstance(header, dict):
        raise Damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[object, object] = {}
    locations = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if kind in _DTYPES:
                dtype, sizes = _DTYPES[kind], tuple(shape)
            case _:
                raise Damaged(f"its entry for '{quoted(name)}' is not one of a plain tensor")
        numbers = all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) and len(sizes) <= 32
        if not numbers or not 0 <= begin <= end <= len(data) - 8 - length:
            raise Damaged(f"its entry for '{quoted(name)}' reaches beyond the file")
        if math.prod(sizes) * dtype.itemsize != end - begin:
            raise Damaged(f"its entry for '{quoted(name)}' gives a shape and a length that differ")
        locations[name] = (8 + length + begin, end - begin)
        storage = StorageRef(name, dtype, math.prod(sizes))
        tensors[name] = StoredTensor(storage, dtype, sizes, _contiguous(sizes), 0)
    return tensors, locations


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))

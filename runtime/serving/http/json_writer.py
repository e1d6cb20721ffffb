# SPDX-License-Identifier: Apache-2.0
"""JSON of plain data and of arrays, in pieces."""

from __future__ import annotations

import json

import numpy as np

_NUMBERS_AT_ONCE = 1 << 15


def to_json(value: object) -> bytes:
    """`value` as JSON; arrays of whole numbers may be part of it, and are written in pieces.

    A long list written at once would hold up every other request for as long as that takes.
    """
    pieces: list[str] = []
    _write_json(value, pieces)
    return "".join(pieces).encode()


def _write_json(value: object, pieces: list[str]) -> None:
    if isinstance(value, dict):
        for position, (key, item) in enumerate(value.items()):
            pieces.append(f"{', ' if position else '{'}{json.dumps(key)}: ")
            _write_json(item, pieces)
        pieces.append("}" if value else "{}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            pieces.append(", " if position else "[")
            _write_json(item, pieces)
        pieces.append("]" if value else "[]")
    elif isinstance(value, np.ndarray):
        for start in range(0, value.size, _NUMBERS_AT_ONCE):
            numbers = json.dumps(value[start : start + _NUMBERS_AT_ONCE].tolist())
            pieces.append(f"{', ' if start else '['}{numbers[1:-1]}")
        pieces.append("]" if value.size else "[]")
    else:
        pieces.append(json.dumps(value))

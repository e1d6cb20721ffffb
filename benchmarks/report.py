# SPDX-License-Identifier: Apache-2.0
"""Benchmark reports: rows of figures as JSON, with all that is needed to judge or repeat them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from internimage_deploy.environment import environment
from internimage_deploy.files import atomic_write

RESULTS = Path(__file__).parent / "results"
Json = Any  # what json.loads returns


def write(name: str, rows: object, **more: object) -> Path:
    """Write `rows` to results/NAME.json; returns the path."""
    path = RESULTS / f"{name}.json"
    write_to(path, rows=rows, **more)
    return path


def kept(name: str, again: Collection[tuple[str, list[int]]]) -> list[dict[str, Json]]:
    """The rows of results/NAME.json but those of the (model, size) pairs in `again`, to be written with new ones.

    Raises:
        SystemExit: they were measured on another machine or with other versions.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    then, now = json.loads(path.read_text()), environment()
    if then["machine"]["cpu"] != now["machine"]["cpu"] or not then["versions"].items() <= now["versions"].items():
        raise SystemExit(f"{path.name} was measured on another machine or with other versions; run without --add")
    return [row for row in then["rows"] if (row["model"], row["size"]) not in again]


def write_to(path: Path, **content: object) -> None:
    """Write `content` to `path`, after the environment that it was measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({**environment(Path(__file__).parent), **content}, indent=1) + "\n")

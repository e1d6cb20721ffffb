# SPDX-License-Identifier: Apache-2.0
"""The one report: a benchmark's rows as JSON, with all that is needed to judge or repeat them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from internimage_deploy.environment import environment
from internimage_deploy.files import atomic_write

RESULTS = Path(__file__).parent / "results"


def write(name: str, rows: Any, **facts: Any) -> Path:
    """Write `rows` to results/NAME.json; returns the path."""
    path = RESULTS / f"{name}.json"
    write_to(path, rows=rows, **facts)
    return path


def kept(name: str, again: Collection[tuple[str, list[int]]]) -> list[dict[str, Any]]:
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


def write_to(path: Path, **facts: Any) -> None:
    """Write `facts` to `path`, after what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({**environment(Path(__file__).parent), **facts}, indent=1) + "\n")

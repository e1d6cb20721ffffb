# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements that outlive whoever measures: each is on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

Row = dict[str, Any]
"""One result. `part` and `case` name it; `status` is one of OK, WRONG, FAILED and NOT_RUN."""

OK = "ok"
WRONG = "WRONG"  # it ran, and its output is not near the reference
FAILED = "failed"  # it raised, crashed or was stopped
NOT_RUN = "not run"  # something that it needs is not here, or the time was used up


class Rows:
    """A file of JSON lines that several processes append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Append a row in one write, and wait until it is on the disk."""
        line = (json.dumps(row, default=str) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    def __iter__(self) -> Iterator[Row]:
        """The rows so far; a last line that was cut off is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def write_report(rows: Rows, path: Path, **more: object) -> None:
    """Write the rows to `path` with the environment that they were measured in, as benchmarks/results/ has them."""
    report.write_to(path, **more, rows=list(rows))


def exit_code(rows: Rows) -> int:
    """0 if something was measured and nothing was wrong or failed, else 1."""
    states = {row["status"] for row in rows}
    return 0 if OK in states and not states & {WRONG, FAILED} else 1

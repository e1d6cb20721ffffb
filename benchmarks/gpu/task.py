# SPDX-License-Identifier: Apache-2.0
"""Tasks of a stage, and running them one after another so that no failure costs more than its own row."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rows import FAILED, NOT_RUN, OK, Row, Rows


class Unavailable(Exception):
    """Something that a task needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Options:
    """What the user points at: folders of sources to compare with, where there are any, and where results go."""

    out: Path
    official: Path | None = None
    dcnv4: Path | None = None


@dataclass(frozen=True)
class Task:
    """One measurement. `run` returns the fields of its row; without a `status` among them it is "ok"."""

    label: str
    run: Callable[[], Row]


def run_tasks(part: str, tasks: Iterable[Task], rows: Rows, deadline: float) -> None:
    """Run every task until `deadline` (of `time.time`), and write a row for each.

    A task that raises gets a row with the traceback; those for which no time is left get one that says so.
    """
    for task in tasks:
        if time.time() >= deadline:
            rows.add({"part": part, "case": task.label, "status": NOT_RUN, "reason": "the time was used up"})
            continue
        print(f"{part}: {task.label}", flush=True)  # in the log, the last line names what a crash happened in
        begun = time.perf_counter()
        try:
            result = task.run()
        except Unavailable as error:
            result = {"status": NOT_RUN, "reason": str(error)}
        except Exception as error:  # whatever it is, the other tasks still run, and the row has the traceback
            reason = f"{type(error).__name__}: {error}"
            result = {"status": FAILED, "reason": reason, "traceback": traceback.format_exc()}
        seconds = round(time.perf_counter() - begun, 2)
        rows.add({"part": part, "case": task.label, "status": OK, **result, "seconds": seconds})

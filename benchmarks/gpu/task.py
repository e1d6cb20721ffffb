# SPDX-License-Identifier: Apache-2.0
"""Tasks of a stage, and running them one after another so that no failure costs more than its own row."""

from __future__ import annotations

import sys
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


def run_tasks(part: str, tasks: Iterable[Task], rows: Rows, deadline: float) -> bool:
    """Run every task that has no row yet, until `deadline` (of `time.time`), and write a row for each.

    A task that raises gets a row with the traceback; those for which no time is left get one that says so.

    Returns:
        False if a task left the GPU unusable for this process; another process may go on with the tasks after it.
    """
    done = {row["case"] for row in rows if row["part"] == part}
    for task in tasks:
        if task.label in done:
            continue
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
        if result.get("status") == FAILED and not gpu_answers():
            return False
    return True


def gpu_answers() -> bool:
    """False once an error has ended this process's use of the GPU, as an access outside memory does."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

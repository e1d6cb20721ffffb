# SPDX-License-Identifier: Apache-2.0
"""The stages, and running one: each part in a process of its own, within the stage's time."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_library import HERE
from rows import FAILED, NOT_RUN, OK, Rows, exit_code, write_report
from task import Options, Task

Tasks = Callable[[Options], Iterator[Task]]

GRACE_S = 20  # between the deadline of a part and its end by force: the task in hand may finish
LAST_S = 10  # kept for writing the report
GPU_LOST = 75  # exit code of a part's process that cannot use the GPU any more; a new one goes on


@dataclass(frozen=True)
class Part:
    """Tasks of one process.

    Attributes:
        name: of the part.
        source: "module:function" that yields the tasks; imported only when they are wanted.
        seconds: at most; what an earlier part leaves over is given to the later ones.
        beside: True for work on the CPU that runs beside the parts after it.
    """

    name: str
    source: str
    seconds: float
    beside: bool = False

    def tasks(self) -> Tasks:
        """The function that yields the tasks."""
        module, _, function = self.source.partition(":")
        found: Tasks = getattr(importlib.import_module(module), function)
        return found


# The most valuable first: what is cut off for lack of time is at the end.
STAGES: dict[str, tuple[Part, ...]] = {
    "A": (
        Part("candidates compiled", "kernel_times:build_tasks", 300, beside=True),
        Part("correct", "correctness:tasks", 200),
        Part("times", "kernel_times:candidate_tasks", 180),
        Part("sanitizer", "nvidia_tools:sanitizer_tasks", 100),
        Part("ncu", "nvidia_tools:ncu_tasks", 60),
    ),
    "B": (Part("variants", "kernel_times:variant_tasks", 500),),
    "C": (Part("networks", "networks:tasks", 500),),
    "D": (
        Part("device layer", "device_layer:tasks", 200),
        Part("tests", "gpu_tests:tasks", 300),
    ),
}


def rows_path(options: Options, stage: str) -> Path:
    """Where the rows of a stage are written."""
    return options.out / f"stage_{stage}.jsonl"


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # where this process begins in the log, which the processes of a part share
    deadline: float


def run(stage: str, options: Options, end: float, notes: Sequence[str]) -> int:
    """Run the parts of a stage until `end` (of `time.time`), write the report, return the exit code."""
    path = rows_path(options, stage)
    for old in (path, *options.out.glob(f"stage_{stage}_*.log")):
        old.unlink(missing_ok=True)
    rows = Rows(path)
    end -= LAST_S
    beside: list[_Running] = []
    parts = STAGES[stage]
    owed = sum(part.seconds for part in parts if not part.beside)
    for part in parts:
        left = end - time.time()
        if part.beside:
            beside.append(_start(stage, part, options, min(end, time.time() + part.seconds)))
            continue
        if left <= 0:
            rows.add({"part": part.name, "case": "", "status": NOT_RUN, "reason": "the time was used up"})
            continue
        # What the parts after it need is theirs, as far as there is enough for all.
        owed -= part.seconds
        deadline = time.time() + max(min(part.seconds, left), left - owed)
        while _finish(_start(stage, part, options, deadline), end, rows):
            continue
        write_report(rows, path.with_suffix(".json"), stage=stage, notes=list(notes))
    for running in beside:
        _finish(running, end, rows)
    write_report(rows, path.with_suffix(".json"), stage=stage, notes=list(notes))
    _print_summary(rows)
    return exit_code(rows)


def _start(stage: str, part: Part, options: Options, deadline: float) -> _Running:
    command = [
        *(sys.executable, str(HERE / "all.py"), "--stage", stage, "--part", part.name),
        *("--deadline", str(deadline), "--out", str(options.out)),
    ]
    for name in ("official", "dcnv4"):
        folder = getattr(options, name)
        command += [f"--{name}", str(folder)] if folder is not None else []
    log = options.out / f"stage_{stage}_{part.name.replace(' ', '_')}.log"
    with log.open("ab") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    return _Running(part, process, log, log_start, deadline)


def _finish(running: _Running, end: float, rows: Rows) -> bool:
    """Wait for a part; end it by force if it outlasts its time, and add a row if it did not end well.

    Returns:
        True if a new process can go on with the tasks after the one that ended this one.
    """
    process, part = running.process, running.part
    stop = min(running.deadline + GRACE_S, end + LAST_S / 2)
    try:
        code = process.wait(max(0.0, stop - time.time()))
        reason = f"its process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        code, reason = -signal.SIGKILL, "it outlasted its time and was ended"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code and code != GPU_LOST:
        text = running.log.read_bytes()[running.log_start :].decode(errors="replace")
        begun = [line for line in text.splitlines() if line.startswith(f"{part.name}: ")]
        case = begun[-1].partition(": ")[2] if begun else ""
        rows.add({"part": part.name, "case": case, "status": FAILED, "reason": reason, "log": text[-3000:]})
        return bool(begun) and time.time() < running.deadline
    return code == GPU_LOST


def _print_summary(rows: Rows) -> None:
    """What was measured and what was not, for who reads the output alone."""
    from kernel_times import summary

    found = list(rows)
    print(*summary(found), sep="\n")
    for row in found:
        if row["status"] != OK:
            print(f"{row['status']:8} {row['part']}: {row['case']} {row.get('reason', '')[:200]}")
    states = [row["status"] for row in found]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))

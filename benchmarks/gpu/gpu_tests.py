# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu, file by file, where pytest is installed."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from clone import REPOSITORY
from rows import NOT_RUN, OK, WRONG, Row
from task import Options, Task, Unavailable

COUNT = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


def tasks(options: Options) -> Iterator[Task]:
    """One task per file."""
    for path in sorted((REPOSITORY / "tests" / "gpu").glob("test_*.py")):
        yield Task(path.name, functools.partial(run, path, options.out))


def run(path: Path, out: Path) -> Row:
    """Run a file of tests that need a GPU; the whole output goes to a file in `out`."""
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed here")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
    (out / f"{path.stem}.log").write_text(done.stdout)
    return judge(done.returncode, done.stdout)


def judge(code: int, output: str) -> Row:
    """The row for pytest's exit code and output; 5 is a file without such tests. Raises if pytest did not work."""
    counts = {
        word.removesuffix("s"): int(number) for number, word in COUNT.findall(output.rstrip().rpartition("\n")[2])
    }
    if code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with exit code {code}: {output[-1000:]}")
    if code == 1:
        return {"status": WRONG, **counts, "log": output[-3000:]}
    reasons = re.findall(r"^SKIPPED .*", output, re.M)
    return {"status": OK if counts.get("passed") else NOT_RUN, **counts, "reason": "; ".join(reasons)[:500]}

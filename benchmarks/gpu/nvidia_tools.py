# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer and ncu over probe.py, where they are installed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from correctness import gpu_library
from kernel_library import HERE
from rows import OK, WRONG, Row
from task import Options, Task, Unavailable

# Sections of ncu that tell which of bytes, L1 and instructions a kernel waits for.
NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.sum",
    "sm__issue_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
)


def sanitizer_tasks(options: Options) -> Iterator[Task]:
    """Reads and writes outside memory, and reads of memory that nothing wrote."""
    for tool in ("memcheck", "initcheck"):
        yield Task(f"compute-sanitizer {tool}", functools.partial(sanitize, tool, options.out))


def ncu_tasks(options: Options) -> Iterator[Task]:
    """What limits the kernel of InternImage-T's first stage."""
    yield Task("ncu on stage 1, batch 8, float16", functools.partial(profile, options.out))


def find(tool: str) -> str:
    """The path of one of NVIDIA's tools. Raises `Unavailable`."""
    places = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    found = shutil.which(tool) or next((str(place / tool) for place in places if (place / tool).is_file()), None)
    if found is None:
        raise Unavailable(f"{tool} is not installed here")
    return found


def probe_command() -> list[str]:
    """probe.py on this GPU; the kernels are compiled first, so that the tool watches no compiler."""
    import torch

    gpu_library()
    major, minor = torch.cuda.get_device_capability()
    return [sys.executable, str(HERE / "probe.py"), "--capability", f"{major}.{minor}"]


def sanitize(tool: str, out: Path) -> Row:
    """Run one tool of compute-sanitizer; its whole output goes to a file in `out`."""
    command = [find("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", *probe_command()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (out / f"sanitizer_{tool}.log").write_text(done.stdout)
    return judge_sanitizer(done.returncode, done.stdout)


def judge_sanitizer(code: int, output: str) -> Row:
    """The row for the tool's exit code and output. Raises where the tool itself did not work."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    ran = re.search(r"(\d+) launches, 0 failed", output)
    if summary is None or (ran is None and summary[1] == "0"):
        raise RuntimeError(f"compute-sanitizer did not finish (exit code {code}): {output[-500:]}")
    errors = int(summary[1])
    return {"status": WRONG if errors else OK, "errors": errors, "launches": int(ran[1]) if ran else None}


def profile(out: Path) -> Row:
    """The metrics of each launch. Clocks are left as they are."""
    command = [
        *(find("ncu"), "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(NCU_METRICS)),
        *(*probe_command(), "--layer"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (out / "ncu.log").write_text(done.stdout)
    launches = parse_ncu(done.stdout)
    if not launches:
        raise RuntimeError(f"ncu reported no launch (exit code {done.returncode}): {done.stdout[-500:]}")
    return {"launches": launches}


def parse_ncu(output: str) -> list[dict[str, str]]:
    """Name and metrics of each launch in ncu's CSV, which follows the program's own output and has a row of units."""
    import csv

    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
    wanted = ("Kernel Name", "Block Size", "Grid Size", *NCU_METRICS)
    return [{name: row[name] for name in wanted if row.get(name)} for row in rows if row["ID"]]

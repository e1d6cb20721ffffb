# SPDX-License-Identifier: Apache-2.0
"""Everything about this project that needs a GPU to be measured, in four stages of at most nine minutes each.

    python benchmarks/gpu/all.py --stage A --official ops_dcnv3 --dcnv4 DCNv4_op      the kernels: right, then how fast
    python benchmarks/gpu/all.py --stage B                                            their variants side by side
    python benchmarks/gpu/all.py --stage C                                            the network's parts in PyTorch
    python benchmarks/gpu/all.py --stage D                                            the runtime's device layer
    python benchmarks/gpu/all.py --stage A --dry-run                                  what would run; needs no GPU

It runs from a clone, installed or not, with PyTorch and a CUDA compiler. Each stage is a list of parts, and each part a
process of its own: whatever fails costs its own row alone. Rows are written as they come, to stage_A.jsonl in --out; at
the end they are in stage_A.json, with the machine, the versions, the commit and the command. A wrong result is marked
WRONG. The exit code is 1 if anything was wrong or failed, or if nothing was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import clone
import stages
from rows import Rows
from task import Options, run_tasks


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=list(stages.STAGES), help="what to measure; see above")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for results (default: %(default)s)")
    parser.add_argument("--official", type=Path, metavar="DIR", help="ops_dcnv3 of an InternImage checkout")
    parser.add_argument("--dcnv4", type=Path, metavar="DIR", help="DCNv4_op of a DCNv4 checkout")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds for the stage (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and stop")
    # How the stage starts the process of a part.
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def list_tasks(parts: Sequence[stages.Part], options: Options) -> int:
    """Print what would run; returns the exit code, 1 if a part cannot even be listed."""
    code = 0
    for part in parts:
        try:
            print(*(f"{part.name}: {task.label}" for task in part.tasks()(options)), sep="\n")
        except ImportError as error:  # the other parts would still run
            print(f"{part.name}: cannot start ({error})", file=sys.stderr)
            code = 1
    return code


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    chosen = parse(arguments)
    for folder in (chosen.official, chosen.dcnv4):
        if folder is not None and not folder.is_dir():
            message = f"error: no folder {folder}: pass the folder with the sources, or leave the option out"
            print(message, file=sys.stderr)
            return 2
    options = Options(chosen.out, chosen.official, chosen.dcnv4)
    parts = stages.STAGES[chosen.stage]
    if chosen.dry_run:
        return list_tasks(parts, options)
    if chosen.part:
        part = next(part for part in parts if part.name == chosen.part)
        rows = Rows(stages.rows_path(options, chosen.stage))
        usable = run_tasks(part.name, part.tasks()(options), rows, chosen.deadline)
        return 0 if usable else stages.GPU_LOST
    from internimage_deploy.runtime.gpu.driver import gpu_problem

    if problem := gpu_problem():
        print(f"error: {problem}: nothing was measured (--dry-run lists what would be)", file=sys.stderr)
        return 1
    return stages.run(chosen.stage, options, time.time() + chosen.limit_s, clone.NOTES)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Figures of ptxas for every kernel: registers, stack and spills per GPU architecture.

    python benchmarks/ptxas.py                       print the table of every architecture
    python benchmarks/ptxas.py --write               and keep it in benchmarks/results/ptxas.json
    python benchmarks/ptxas.py --arch 87 --check     compare with what is kept there; exit 1 if anything is worse

A kernel is worse when it has a stack or spills, or, under the CUDA version of the kept table, more registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internimage_deploy.trt_plugins.build import KERNEL_SOURCES, SOURCES
from internimage_deploy.trt_plugins.toolchain import Nvcc, find_nvcc

RESULTS = Path(__file__).parent / "results" / "ptxas.json"
FIGURES = ("registers", "stack", "spill_stores", "spill_loads")
SCALARS = {"f": "float32", "NS_4HalfE": "float16", "NS_8BFloat16E": "bfloat16"}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SCALAR = r"(f|NS_4HalfE|NS_8BFloat16E)"
DCNV3 = re.compile(rf"12Dcnv3VariantI{SCALAR}Li(\d+)ELi(\d+)ELi(\d+)ELb([01])ELNS_4BodyE(\d)E")
MS_DEFORM_ATTN = re.compile(rf"19MsDeformAttnVariantI{SCALAR}Li(\d+)ELi(\d+)ELi(\d+)E")
UPSAMPLE_ARGMAX = re.compile(rf"21UpsampleArgmaxVariantI{SCALAR}Li(\d+)E")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")

Table = dict[str, dict[str, dict[str, int]]]


def variant_name(mangled: str) -> str:
    """E.g. "float16 C16 8x2 softmax half": storage, group width, channels per access x accesses per thread, and body.

    The other kernels have their operator's name before it: those of MSDeformAttn the points of a level instead of the
    group width, those of UpsampleArgmax the rows of labels per thread.
    """
    match = UPSAMPLE_ARGMAX.search(mangled)
    if match is not None:
        return f"UpsampleArgmax {SCALARS[match[1]]} {match[2]}x4"
    match = MS_DEFORM_ATTN.search(mangled)
    if match is not None:
        scalar, width, vectors, points = match.groups()
        return f"MSDeformAttn {SCALARS[scalar]} {'any' if points == '0' else 'P' + points} {width}x{vectors}"
    match = DCNV3.search(mangled)
    if match is None:
        raise ValueError(f"not a kernel of the plugins: {mangled}")
    scalar, width, vectors, group, softmax, body = match.groups()
    name = f"{SCALARS[scalar]} {'any' if group == '0' else 'C' + group} {width}x{vectors}"
    return name + (" softmax" if softmax == "1" else "") + ("", " branch-free", " half")[int(body)]


def parse(log: str) -> Table:
    """The output of ptxas -v to {architecture: {kernel: figures}}."""
    table: Table = {}
    figures: dict[str, int] = {}
    for line in log.splitlines():
        entry, frame, registers = ENTRY.search(line), FRAME.search(line), REGISTERS.search(line)
        if entry:
            figures = table.setdefault(f"sm_{entry[2]}", {}).setdefault(variant_name(entry[1]), {})
        elif frame:
            figures |= dict(zip(FIGURES[1:], map(int, frame.groups()), strict=True))
        elif registers:
            figures["registers"] = int(registers[1])
    return table


def compile_all(nvcc: Nvcc, architectures: list[int], jobs: int) -> Table:
    """Compile every kernel for every architecture and collect the figures of ptxas."""
    sources = [name for name in KERNEL_SOURCES if name.endswith(".cu")]

    def one(task: tuple[int, str]) -> str:
        architecture, source = task
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(str(nvcc.path), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"),
                *(str(SOURCES / source), "-o", f"{folder}/kernel.cubin"),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stderr + done.stdout

    table: Table = {}
    with ThreadPoolExecutor(jobs) as pool:
        for log in pool.map(one, [(a, s) for a in architectures for s in sources]):
            for architecture, kernels in parse(log).items():
                table.setdefault(architecture, {}).update(kernels)
    return table


def worse(table: Table, kept: Table, *, same_compiler: bool) -> list[str]:
    """Figures that are worse in `table` than in `kept`: one line each."""
    complaints = []
    for architecture, kernels in table.items():
        before = kept.get(architecture, {})
        for name, figures in kernels.items():
            for figure in FIGURES[1:]:
                if figures[figure]:
                    complaints.append(f"{architecture} {name}: {figures[figure]} bytes of {figure.replace('_', ' ')}")
            limit = before.get(name, {}).get("registers")
            if limit is None:
                complaints.append(f"{architecture} {name}: not in the kept table; run with --write")
            elif same_compiler and figures["registers"] > limit:
                complaints.append(f"{architecture} {name}: {figures['registers']} registers, {limit} before")
        complaints += [f"{architecture} {name}: gone; run with --write" for name in before.keys() - kernels.keys()]
    return complaints


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", help="default: every architecture of the compiler")
    parser.add_argument("--nvcc", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)

    nvcc = find_nvcc(options.nvcc)
    table = compile_all(nvcc, options.arch or list(nvcc.architectures), options.jobs)
    print(f"CUDA {nvcc.version}")
    for architecture, kernels in table.items():
        name, most = max(kernels.items(), key=lambda item: [item[1][f] for f in (*FIGURES[1:], "registers")])
        figures = ", ".join(f"{figure} {most[figure]}" for figure in FIGURES)
        print(f"{architecture:7} {len(kernels)} kernels; worst: {name}: {figures}")
    if options.write:
        RESULTS.write_text(json.dumps({"cuda": nvcc.version, "kernels": table}, indent=1) + "\n")
    if options.check:
        kept = json.loads(RESULTS.read_text())
        complaints = worse(table, kept["kernels"], same_compiler=kept["cuda"] == nvcc.version)
        print(*complaints, sep="\n", file=sys.stderr)
        return 1 if complaints else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

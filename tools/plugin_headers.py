# SPDX-License-Identifier: Apache-2.0
"""Check the plugin's C++ against TensorRT's headers: `python tools/plugin_headers.py DIR...`, or `make plugin-headers`.

Each DIR holds the headers of one TensorRT release: the folder include/ of NVIDIA's public TensorRT repository at that
release's tag, or what the Debian package libnvinfer-headers-dev installs. For every interface of the release the
plugin's sources are compiled, and what csrc/register/tensorrt_layout.h says about TensorRT's classes is compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins.build import PLUGIN_SOURCES, SOURCES
from internimage_deploy.trt_plugins.toolchain import default_interface, find_headers, find_nvcc, major

LAYOUT = Path(__file__).resolve().parents[1] / "tests" / "trt_plugins" / "cpp" / "tensorrt_layout.cpp"
WARNINGS = "-Wall,-Wextra,-Werror,-Wno-deprecated-declarations"


def interfaces(version: str) -> tuple[str, ...]:
    """The plugin interfaces that a TensorRT release has."""
    return ("v2", "v3") if default_interface(major(version)) == "v3" else ("v2",)


def check(folder: Path, nvcc: Path) -> dict[str, str]:
    """What is wrong with each part under the headers in `folder`, in the compiler's words; empty where nothing is.

    Parts are "v2", "v3" and "layout". Raises `UserError` if the folder holds no headers.
    """
    headers = find_headers(folder)
    # nvcc brings the CUDA headers to the host compiler, which is all that it calls here.
    command = [str(nvcc), "-std=c++17", "-Xcompiler", WARNINGS, f"-I{SOURCES}", "-isystem", str(headers.path)]
    sources = [str(SOURCES / name) for name in PLUGIN_SOURCES]
    with tempfile.TemporaryDirectory() as temporary:
        found = {
            interface: _run([*command, "-c", f"-DPLUGIN_INTERFACE={interface[1]}", "-odir", temporary, *sources])
            for interface in interfaces(headers.version)
        }
        program = str(Path(temporary) / "layout")
        found["layout"] = _run([*command, "-cudart=none", str(LAYOUT), "-o", program]) or _run([program])
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (done.stdout.strip() or f"exit code {done.returncode}") if done.returncode else ""


def main() -> int:
    """Check every folder; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="headers of one TensorRT release")
    folders = parser.parse_args().folders
    nvcc = find_nvcc().path
    failed = False
    for folder in folders:
        found = check(folder, nvcc)
        failed = failed or any(found.values())
        states = ", ".join(f"{part} {'FAILS' if problem else 'ok'}" for part, problem in found.items())
        print(f"TensorRT {find_headers(folder).version:10} {states}  ({folder})", flush=True)
        for problem in filter(None, found.values()):
            print(problem)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

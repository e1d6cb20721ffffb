# SPDX-License-Identifier: Apache-2.0
"""Compiling the plugin library into the user's cache, under a key of everything that it depends on."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internimage_deploy.cache import build_once, cache_folder, fingerprint, run_compiler
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_path, atomic_write
from internimage_deploy.trt_plugins.toolchain import Headers, Nvcc, find_headers, find_nvcc, major

LIBRARY = "libinternimage_trt_plugins.so"
SOURCES = Path(__file__).resolve().parent / "csrc"
RECORD = "plugin.json"

KERNELS = ("dcnv3", "ms_deform_attn", "upsample_argmax")
# The kernels, which know CUDA alone, and the plugins around them, which know TensorRT too. CMakeLists.txt lists the
# same.
KERNEL_SOURCES = (
    *(f"kernel/{kernel}_{dtype}.cu" for kernel in KERNELS for dtype in ("float32", "float16", "bfloat16")),
    *(f"kernel/{kernel}_{part}.cpp" for kernel in KERNELS for part in ("launch", "variants")),
    "kernel/grid.cpp",
    "kernel/launch.cpp",
)
PLUGIN_SOURCES = (
    "plugin/dcnv3_attributes.cpp",
    *(f"plugin/{kernel}_operator.cpp" for kernel in KERNELS),
    "plugin/operator.cpp",
    "plugin/plugin_log.cpp",
    "plugin/plugin_registration.cpp",
    "plugin/plugin_v2.cpp",
    "plugin/plugin_v3.cpp",
)
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-cudart=static", "-diag-suppress=1444,1445"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wno-deprecated-declarations"),
    *("-Xlinker", "-z,defs"),
)

Interface = Literal["v2", "v3"]


def default_interface(tensorrt_major: int) -> Interface:
    """The plugin interface for a TensorRT: IPluginV3 came with version 10."""
    return "v3" if tensorrt_major >= 10 else "v2"


def sources_key() -> str:
    """A digest of the C++ and CUDA sources."""
    return fingerprint((path for path in SOURCES.rglob("*") if path.is_file()), [])


def cached_libraries(tensorrt: str | None = None, *, any_headers: bool = False) -> list[Path]:
    """Libraries in the cache that were built from these sources: those for most GPUs first, then the newest.

    Args:
        tensorrt: A TensorRT version; only libraries built with headers of its major version are returned.
        any_headers: Return those with the interface for `tensorrt`, whatever headers they were built with.
    """
    found = []
    for record in (cache_folder() / "plugin").glob(f"*/{RECORD}"):
        library = record.parent / LIBRARY
        try:
            built = json.loads(record.read_text())
            fits = built["sources"] == sources_key() and built["machine"] == platform.machine()
            if tensorrt is not None:
                number = major(tensorrt)
                if any_headers:
                    fits = fits and built["interface"] == default_interface(number)
                else:
                    fits = fits and major(built["tensorrt"]) == number
            if fits:
                found.append((len(built["architectures"]), library.stat().st_mtime, library))
        except (OSError, ValueError, KeyError):
            continue  # not a whole entry: another process may be writing it
    return [library for *_, library in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Plan:
    """One library to build. `architectures` are compute capabilities times ten, e.g. 87."""

    nvcc: Nvcc
    headers: Headers
    architectures: tuple[int, ...]
    interface: Interface

    @property
    def key(self) -> str:
        """A digest of sources, flags, architectures, interface, machine, TensorRT and CUDA versions."""
        settings = [sources_key(), *FLAGS, *self._architecture_flags(), self.interface, platform.machine()]
        settings += [f"cuda {self.nvcc.version}", f"tensorrt {self.headers.version}"]
        return fingerprint([], settings)

    @property
    def target(self) -> Path:
        """Where the library is kept."""
        return cache_folder() / "plugin" / self.key / LIBRARY

    def describe(self) -> list[str]:
        """The tools and settings, one line each."""
        return [
            f"nvcc       {self.nvcc.path} (CUDA {self.nvcc.version})",
            f"TensorRT   {self.headers.version} headers in {self.headers.path} ({self.headers.source})",
            f"interface  {'IPluginV3' if self.interface == 'v3' else 'IPluginV2DynamicExt'}",
            f"GPUs       compute capability {', '.join(map(_dotted, self.architectures))}",
        ]

    def _architecture_flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in self.architectures]
        # PTX of the newest, for GPUs that come after it.
        newest = self.architectures[-1]
        return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]

    def command(self, target: Path) -> list[str]:
        """The compiler's command line."""
        return [
            str(self.nvcc.path), *FLAGS, *self._architecture_flags(),
            "-Xlinker", f"--version-script={SOURCES / 'plugin' / 'exports.map'}",
            f"-DPLUGIN_INTERFACE={self.interface[1]}", f"-I{SOURCES}", "-isystem", str(self.headers.path),
            "--threads", str(min(os.cpu_count() or 1, 8)),
            *(str(SOURCES / name) for name in (*KERNEL_SOURCES, *PLUGIN_SOURCES)), "-o", str(target),
        ]  # fmt: skip


def _dotted(architecture: int) -> str:
    """87 as "8.7"."""
    return f"{architecture // 10}.{architecture % 10}"


def make_plan(
    *,
    nvcc: Path | None = None,
    tensorrt_include: Path | None = None,
    architectures: Sequence[int] | None = None,
    interface: Interface | None = None,
) -> Plan:
    """Find the tools, and take defaults for the rest: every architecture of the toolkit, the headers' interface.

    Raises:
        UserError: a tool is missing, an architecture is unknown to the compiler, or the interface to the headers.
    """
    compiler = find_nvcc(nvcc)
    headers = find_headers(tensorrt_include)
    if interface is None:
        interface = default_interface(headers.major)
    if interface == "v3" and headers.major < 10:
        raise UserError(
            f"--interface v3 needs TensorRT 10 or later, but the headers in {headers.path} are {headers.version}"
        )
    unknown = [number for number in architectures or () if number not in compiler.architectures]
    if unknown:
        raise UserError(
            f"compute capability {_dotted(unknown[0])}: CUDA {compiler.version} compiles for "
            f"{', '.join(map(_dotted, compiler.architectures))}"
        )
    chosen = tuple(sorted(set(architectures))) if architectures else compiler.architectures
    return Plan(compiler, headers, chosen, interface)


def build(plan: Plan) -> tuple[Path, bool]:
    """The library of `plan`, compiled unless the cache has it. Returns its path and whether it was compiled.

    Raises:
        UserError: the compiler failed (its complete output is kept), or the cache cannot be written to.
    """
    log = plan.target.parent / "build.log"
    record = {
        "sources": sources_key(),
        "machine": platform.machine(),
        "cuda": plan.nvcc.version,
        "tensorrt": plan.headers.version,
        "interface": plan.interface,
        "architectures": plan.architectures,
    }

    def compile_library(path: Path) -> None:
        run_compiler(plan.command(path), log)
        atomic_write(plan.target.parent / RECORD, json.dumps(record, indent=1))

    return plan.target, build_once(plan.target, compile_library)


def copy_library(source: Path, target: Path) -> None:
    """Copy a library to `target` in one step. Raises `UserError` if it cannot be written."""
    with atomic_path(target) as path:
        shutil.copyfile(source, path)

# SPDX-License-Identifier: Apache-2.0
"""Compiling the plugin library into the user's cache, under a key of everything that it depends on."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from internimage_deploy.cache import build_once, cache_folder, fingerprint, run_compiler
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_path, atomic_write
from internimage_deploy.trt_plugins import driver
from internimage_deploy.trt_plugins.toolchain import (
    Headers,
    Nvcc,
    default_interface,
    find_headers,
    find_nvcc,
    major,
    serves,
)

LIBRARY = "libinternimage_trt_plugins.so"
REGISTER_LIBRARY = "libinternimage_trt_register.so"
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
# The second library, which registers the first one when it is opened.
REGISTER_SOURCE = "register/register.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-cudart=static", "-diag-suppress=1444,1445"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wno-deprecated-declarations"),
    *("-Xlinker", "-z,defs"),
)
REGISTER_FLAGS = (
    *("-std=c++17", "-O2", "-shared", "-cudart=none", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xlinker", "-z,defs", "-ldl"),
)

Interface = Literal["v2", "v3"]


def sources_key() -> str:
    """A digest of the C++ and CUDA sources."""
    return fingerprint((path for path in SOURCES.rglob("*") if path.is_file()), [])


def runs_on(architectures: Sequence[int], gpus: Sequence[int]) -> bool:
    """Whether code for `architectures`, and PTX of the newest, runs on every GPU of these compute capabilities."""
    return all(
        max(architectures) <= gpu or any(number // 10 == gpu // 10 and number <= gpu for number in architectures)
        for gpu in gpus
    )


def cached_libraries(tensorrt: str | None = None, *, any_headers: bool = False, gpus: Sequence[int] = ()) -> list[Path]:
    """Libraries in the cache that were built from these sources: those for most GPUs first, then the newest.

    Args:
        tensorrt: A TensorRT version; only libraries that it can take and that were built with headers of its major
            version are returned.
        any_headers: Return also those of other major versions that it can take.
        gpus: Compute capabilities times ten; only libraries that run on all of them are returned.
    """
    found = []
    for record in (cache_folder() / "plugin").glob(f"*/{RECORD}"):
        library = record.parent / LIBRARY
        try:
            built = json.loads(record.read_text())
            fits = built["sources"] == sources_key() and built["machine"] == platform.machine()
            fits = fits and runs_on(built["architectures"], gpus)
            if tensorrt is not None:
                fits = fits and serves(built["tensorrt"], built["interface"], tensorrt)
                fits = fits and (any_headers or major(built["tensorrt"]) == major(tensorrt))
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
        return fingerprint([], [*settings, *REGISTER_FLAGS])

    @property
    def target(self) -> Path:
        """Where the library is kept."""
        return cache_folder() / "plugin" / self.key / LIBRARY

    def describe(self) -> list[str]:
        """The tools and settings, one line each."""
        built = self.headers.version
        if self.interface == "v3":
            served = "10 and later"
        else:
            served = ".".join(built.split(".")[: 2 if self.headers.major == 8 else 1])
        return [
            f"nvcc       {self.nvcc.path} (CUDA {self.nvcc.version})",
            f"TensorRT   {self.headers.version} headers in {self.headers.path} ({self.headers.source})",
            f"interface  {'IPluginV3' if self.interface == 'v3' else 'IPluginV2DynamicExt'}",
            f"runs in    TensorRT {served}",
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

    def register_command(self, target: Path) -> list[str]:
        """The compiler's command line for the registering library, which needs neither CUDA nor TensorRT."""
        return [str(self.nvcc.path), *REGISTER_FLAGS, str(SOURCES / REGISTER_SOURCE), "-o", str(target)]


def _dotted(architecture: int) -> str:
    """87 as "8.7"."""
    return f"{architecture // 10}.{architecture % 10}"


def make_plan(
    *,
    nvcc: Path | None = None,
    tensorrt_include: Path | None = None,
    architectures: Sequence[int] | None = None,
    interface: Interface | None = None,
    tensorrt: str | None = None,
) -> Plan:
    """Find the tools, and take defaults for the rest: every architecture of the toolkit, the headers' interface.

    With `tensorrt`, the version that is to take the library, only headers that serve it are taken.

    Raises:
        UserError: a tool is missing or fits neither driver nor TensorRT, an architecture is unknown to the compiler,
            or the interface to the headers.
    """
    headers = find_headers(tensorrt_include, tensorrt=tensorrt)
    compiler = find_nvcc(nvcc)
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


def plan_for_this_machine(tensorrt: str | None = None) -> Plan:
    """A plan for this machine's GPUs alone, as a command makes it that needs the library now: one takes seconds to a
    minute to compile for, all of them take many. Without a GPU, and for one that the compiler does not know, all.

    Raises:
        UserError: as `make_plan`.
    """
    plan = make_plan(tensorrt=tensorrt)
    here = driver.architectures()
    return replace(plan, architectures=here) if here and set(here) <= set(plan.architectures) else plan


def build(plan: Plan) -> tuple[Path, bool]:
    """The library of `plan`, compiled unless the cache has it. Returns its path and whether it was compiled.

    The registering library lies beside it, as REGISTER_LIBRARY.

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
        with atomic_path(plan.target.parent / REGISTER_LIBRARY) as register:
            run_compiler(plan.register_command(register), log)
        run_compiler(plan.command(path), log)
        atomic_write(plan.target.parent / RECORD, json.dumps(record, indent=1))

    return plan.target, build_once(plan.target, compile_library)


def find_register_library(library: Path) -> Path:
    """The registering library for `library`: the one beside it, else one in the cache, for it serves every version.

    Raises:
        UserError: there is none; the message names the command that compiles it.
    """
    for candidate in (library, *cached_libraries()):
        beside = candidate.with_name(REGISTER_LIBRARY)
        if beside.is_file():
            return beside
    raise UserError(
        f"{library.with_name(REGISTER_LIBRARY)} is missing: copy it from where build-plugin wrote it, or run  "
        "internimage-deploy build-plugin"
    )


def copy_libraries(library: Path, target: Path) -> Path:
    """Copy `library` to `target`, and the registering library beside it. Returns the latter's path.

    Raises:
        UserError: a file cannot be written, `target` has the registering library's name, or there is none.
    """
    register = target.with_name(REGISTER_LIBRARY)
    if register == target:
        raise UserError(f"{target}: the registering library gets that name; expected another, such as {LIBRARY}")
    for source, destination in ((library, target), (find_register_library(library), register)):
        with atomic_path(destination) as path:
            shutil.copyfile(source, path)
    return register

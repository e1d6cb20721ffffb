# SPDX-License-Identifier: Apache-2.0
"""Finding a CUDA compiler and TensorRT headers that fit this machine and each other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internimage_deploy.cache import build_once, cache_folder
from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins import driver

# Xavier and Turing to Blackwell; Thor is 101 up to CUDA 12.9 and 110 from 13.0. cmake/architectures.cmake has the same
# list.
ARCHITECTURES = (72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)

LOCAL = Path("/usr/local")  # where CUDA toolkits are installed

# The wheel on PyPI that carries TensorRT's headers; TensorRT's own wheels have none.
HEADERS_WHEEL = "kernel-lens==2.0.1"
HEADERS_IN_WHEEL = "kernel_lens/include/tensorrt/"
HEADERS_VERSION = "10.14"
SYSTEM_FOLDERS = (
    f"/usr/include/{platform.machine()}-linux-gnu",
    "/usr/include",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
# Where the headers of any other version are, for messages.
HEADERS_SOURCE = (
    "the folder include/ of NVIDIA's public TensorRT repository at that release's tag, or the Debian package "
    "libnvinfer-headers-dev (8.5: libnvinfer-dev), which JetPack brings too"
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: path, version such as "13.0", and the GPU architectures (such as 87) that it compiles for."""

    path: Path
    version: str
    architectures: tuple[int, ...]


def major(version: str) -> int:
    """The major number of a version of TensorRT or CUDA."""
    return int(version.split(".")[0])


def serves(built: str, interface: str, tensorrt: str) -> bool:
    """Whether TensorRT `tensorrt` can take a library with headers of version `built` and interface "v2" or "v3".

    Handing it any other crashes it: the classes differ in memory between 8.5 (which has no loadLibrary), 8.6, 9 and 10,
    and from 10 on only those of IPluginV3 stayed as they are. csrc/register/register.cpp has the same rule.
    """
    if major(built) != major(tensorrt):
        return interface == "v3" and min(major(built), major(tensorrt)) >= 10
    return major(tensorrt) != 8 or built.split(".")[1] == tensorrt.split(".")[1]


def default_interface(tensorrt_major: int) -> Literal["v2", "v3"]:
    """The plugin interface for a TensorRT: IPluginV3 came with version 10."""
    return "v3" if tensorrt_major >= 10 else "v2"


@dataclass(frozen=True)
class Headers:
    """TensorRT's headers: their folder, version such as "10.14.1", and how they were found."""

    path: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        """The major version."""
        return major(self.version)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{' '.join(command)} failed: {error}") from error


def _pypi_nvcc() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return [path for folder in folders for path in sorted(folder.glob("cu*/bin/nvcc"), reverse=True)]


def find_nvcc(path: Path | None = None) -> Nvcc:
    """A CUDA compiler whose programs this machine's driver starts; on a machine without a driver any compiler.

    Looked for in this order: `path`, which is taken whatever the driver, $CUDACXX, $CUDA_HOME and $CUDA_PATH, the PATH,
    /usr/local/cuda and its versions, the wheels of nvidia-cuda-nvcc.

    Raises:
        UserError: there is none, it does not run, or all are of a newer CUDA than the driver's.
    """
    if path:
        candidates = [path]
    else:
        named = [Path(os.environ["CUDACXX"])] if os.environ.get("CUDACXX") else []
        folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        on_path = shutil.which("nvcc")
        installed = [LOCAL / "cuda/bin/nvcc", *sorted(LOCAL.glob("cuda-*/bin/nvcc"), reverse=True)]
        candidates = [*named, *(Path(folder) / "bin/nvcc" for folder in folders)]
        candidates += [*([Path(on_path)] if on_path else []), *installed, *_pypi_nvcc()]
    limit = None if path else driver.cuda_version()
    found = []
    for candidate in candidates:
        if candidate.is_file():
            nvcc = _examine(candidate)
            if limit is None or not nvcc.version[0].isdigit() or major(nvcc.version) <= limit[0]:
                return nvcc
            found.append(f"{nvcc.path} is CUDA {nvcc.version}")
    if found and limit:
        raise UserError(
            f"the NVIDIA driver here starts programs of CUDA {limit[0]}.{limit[1]} and older, and {', '.join(found)}: "
            f"install the CUDA {limit[0]} toolkit or a newer driver, or name a compiler with --nvcc to compile for "
            "another machine"
        )
    raise UserError(
        f"no CUDA compiler found (looked at {', '.join(map(str, candidates))}): install the CUDA toolkit, or for "
        "CUDA 13 run  pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm"
    )


def _examine(path: Path) -> Nvcc:
    version = re.search(r"release (\d+\.\d+)", _output([str(path), "--version"]))
    known = {int(n) for n in re.findall(r"sm_(\d+)\b", _output([str(path), "--list-gpu-code"]))}
    return Nvcc(path, version[1] if version else "unknown", tuple(a for a in ARCHITECTURES if a in known))


def headers_version(folder: Path) -> str | None:
    """The version of the TensorRT headers in `folder`, or None if they are not there."""
    version_file = folder / "NvInferVersion.h"
    if not (folder / "NvInferRuntime.h").is_file() or not version_file.is_file():
        return None
    defines: dict[str, str] = dict(
        re.findall(r"^#define (\w+)[ \t]+(\w+)", version_file.read_text(errors="replace"), re.M)
    )

    def number(name: str) -> str:
        value = defines.get(f"NV_TENSORRT_{name}", "0")
        return defines.get(value, value)  # from TensorRT 11 on through a second macro

    return ".".join(number(name) for name in ("MAJOR", "MINOR", "PATCH"))


def installed_tensorrt() -> str | None:
    """The version of the Python package tensorrt on this machine, without importing it."""
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def find_headers(path: Path | None = None, *, tensorrt: str | None = None) -> Headers:
    """TensorRT's headers.

    Looked for in this order: `path`, $TENSORRT_ROOT, the system's folders (JetPack, Debian packages, containers, the
    compiler's), the user's cache; failing that they are downloaded into the cache from the wheel that carries them.

    Args:
        path: Their folder, if it is known.
        tensorrt: The TensorRT that is to take the library; headers that do not serve it are passed over.

    Raises:
        UserError: `path` or $TENSORRT_ROOT holds no headers, none serve `tensorrt`, or the download failed.
    """

    def fits(version: str | None) -> bool:
        return version is not None and (
            tensorrt is None or serves(version, default_interface(major(version)), tensorrt)
        )

    root = os.environ.get("TENSORRT_ROOT")
    others = []
    for folder, source in ((path, "--tensorrt-include"), (Path(root) / "include" if root else None, "TENSORRT_ROOT")):
        if folder is not None:
            version = headers_version(folder)
            if version is None:
                raise UserError(
                    f"{source}: no NvInferRuntime.h with its NvInferVersion.h in {folder}; expected the include "
                    "folder of a TensorRT installation"
                )
            if fits(version):
                return Headers(folder.absolute(), version, source)
            others.append(f"those in {folder} are {version}")
    for name in SYSTEM_FOLDERS:
        version = headers_version(Path(name))
        if version is not None and fits(version):
            return Headers(Path(name), version, "system")
        others += [f"those in {name} are {version}"] if version else []
    if not fits(HEADERS_VERSION):
        others.append(f"those on PyPI are {HEADERS_VERSION}")
        raise UserError(
            f"a plugin for TensorRT {tensorrt} needs the headers of TensorRT {_release(tensorrt or '')}, and "
            f"{', '.join(others)}: take {HEADERS_SOURCE}, and run  "
            "internimage-deploy build-plugin --tensorrt-include DIR"
        )
    folder = cache_folder() / "tensorrt-headers" / HEADERS_VERSION
    build_once(folder / "complete", lambda stamp: _download_headers(folder, stamp))
    version = headers_version(folder)
    if version is None:
        raise UserError(f"{folder} is incomplete: remove it and try again")
    return Headers(folder, version, f"the wheel {HEADERS_WHEEL}")


def _release(version: str) -> str:
    """The part of a version that headers must share: "8.6" of "8.6.1", "9" of "9.3.0"."""
    return ".".join(version.split(".")[: 2 if major(version) == 8 else 1])


def _download_headers(folder: Path, stamp: Path) -> None:
    """Unpack the headers of the wheel, and nothing else of it, into `folder`."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(stamp.parent / "wheel"), HEADERS_WHEEL),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list((stamp.parent / "wheel").glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"no TensorRT headers on this machine, and '{' '.join(command[1:])}' failed: install TensorRT's "
            f"development package, or pass --tensorrt-include\n{done.stdout.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in wheel.namelist():
            if name.startswith(HEADERS_IN_WHEEL) and name.endswith(".h"):
                (folder / Path(name).name).write_bytes(wheel.read(name))
    shutil.rmtree(stamp.parent / "wheel")
    stamp.write_text(f"{HEADERS_WHEEL}\n")

# SPDX-License-Identifier: Apache-2.0
"""Finding nvcc and the TensorRT headers."""

from __future__ import annotations

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

from internimage_deploy.cache import build_once, cache_folder
from internimage_deploy.errors import UserError

# Xavier and Turing to Blackwell; Thor is 101 up to CUDA 12.9 and 110 from 13.0. cmake/architectures.cmake has the same
# list.
ARCHITECTURES = (72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)

# The wheel on PyPI that carries TensorRT's headers; TensorRT's own wheels have none.
HEADERS_WHEEL = "kernel-lens==2.0.1"
HEADERS_IN_WHEEL = "kernel_lens/include/tensorrt/"
HEADERS_VERSION = "10.14"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: path, version such as "13.0", and the GPU architectures (such as 87) that it compiles for."""

    path: Path
    version: str
    architectures: tuple[int, ...]


def major(version: str) -> int:
    """The major number of a TensorRT version."""
    return int(version.split(".")[0])


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
    """The CUDA compiler.

    Looked for in this order: `path`, $CUDACXX, $CUDA_HOME and $CUDA_PATH, the PATH, /usr/local/cuda, the wheels of
    nvidia-cuda-nvcc.

    Raises:
        UserError: there is none, or it does not run.
    """
    candidates: list[Path] = []
    if path:
        candidates = [path]
    else:
        if os.environ.get("CUDACXX"):
            candidates.append(Path(os.environ["CUDACXX"]))
        candidates += [
            Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
        ]
        on_path = shutil.which("nvcc")
        candidates += [Path(on_path)] if on_path else []
        candidates += [Path("/usr/local/cuda/bin/nvcc"), *_pypi_nvcc()]
    for candidate in candidates:
        if candidate.is_file():
            version = re.search(r"release (\d+\.\d+)", _output([str(candidate), "--version"]))
            known = {int(n) for n in re.findall(r"sm_(\d+)\b", _output([str(candidate), "--list-gpu-code"]))}
            return Nvcc(candidate, version[1] if version else "unknown", tuple(a for a in ARCHITECTURES if a in known))
    raise UserError(
        f"no CUDA compiler found (looked at {', '.join(map(str, candidates))}): install the CUDA toolkit, or run  "
        "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm"
    )


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


def find_headers(path: Path | None = None) -> Headers:
    """TensorRT's headers.

    Looked for in this order: `path`, $TENSORRT_ROOT, the system's folders (JetPack, Debian packages, containers, the
    compiler's), the user's cache; failing that they are downloaded into the cache from the wheel that carries them.

    Raises:
        UserError: `path` or $TENSORRT_ROOT holds no headers, or the download failed.
    """
    root = os.environ.get("TENSORRT_ROOT")
    for folder, source in ((path, "--tensorrt-include"), (Path(root) / "include" if root else None, "TENSORRT_ROOT")):
        if folder is not None:
            version = headers_version(folder)
            if version is None:
                raise UserError(
                    f"{source}: no NvInferRuntime.h with its NvInferVersion.h in {folder}; expected the include "
                    "folder of a TensorRT installation"
                )
            return Headers(folder.absolute(), version, source)
    machine = f"{platform.machine()}-linux-gnu"
    for name in (f"/usr/include/{machine}", "/usr/include", "/usr/local/include", "/usr/local/tensorrt/include",
                 "/opt/tensorrt/include"):  # fmt: skip
        version = headers_version(Path(name))
        if version:
            return Headers(Path(name), version, "system")
    folder = cache_folder() / "tensorrt-headers" / HEADERS_VERSION
    build_once(folder / "complete", lambda stamp: _download_headers(folder, stamp))
    version = headers_version(folder)
    if version is None:
        raise UserError(f"{folder} is incomplete: remove it and try again")
    return Headers(folder, version, f"the wheel {HEADERS_WHEEL}")


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

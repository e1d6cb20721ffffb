# SPDX-License-Identifier: Apache-2.0
"""The CMake build and its aarch64 toolchain: a library for Jetson, made on x86."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile

import pytest
from test_build import ROOM, exported, needed, tool

from internimage_deploy.cache import build_once, cache_folder, fingerprint


@pytest.fixture(scope="session")
def aarch64_runtime(nvcc):
    """The CUDA runtime for aarch64, of the compiler's version, unpacked from NVIDIA's wheel."""
    folder = cache_folder() / "tests" / f"cudart-aarch64-{nvcc.version}"

    def download(stamp):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", "manylinux2014_aarch64", "-d", str(folder), f"nvidia-cuda-runtime=={nvcc.version}.*"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no aarch64 CUDA runtime {nvcc.version} to link with: {done.stderr.strip()[-300:]}")
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            wheel.unlink()
        stamp.write_text("")

    build_once(folder / "complete", download)
    return next(folder.glob("nvidia/*/lib/libcudart_static.a")).parents[1]


@pytest.fixture(scope="session")
def jetson_build(aarch64_runtime, headers, nvcc):
    """The folder of a CMake build for aarch64, made once per source state like the other libraries of these tests."""
    compiler = shutil.which("aarch64-linux-gnu-g++-12")
    if compiler is None:
        pytest.skip("no aarch64 compiler: apt install g++-12-aarch64-linux-gnu")
    assert platform.machine() == "x86_64"
    settings = [
        "-DPLUGIN_INTERFACE=v2",
        "-DCMAKE_TOOLCHAIN_FILE=cmake/toolchain-aarch64-linux.cmake",
        f"-DCUDA_AARCH64_ROOT={aarch64_runtime}",
        f"-DCMAKE_CUDA_COMPILER={nvcc.path}",
        f"-DTENSORRT_INCLUDE_DIR={headers.path}",
    ]
    sources = [path for name in ("csrc", "cmake") for path in (ROOM / name).rglob("*") if path.is_file()]
    key = fingerprint([*sources, ROOM / "CMakeLists.txt"], [*settings, nvcc.version, headers.version])
    folder = cache_folder() / "tests" / f"jetson-{key}"

    def configure_and_compile(stamp):
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        configure = [tool("cmake"), *ninja, "-B", folder / "build", "-S", ROOM, *settings]
        for command in (configure, [tool("cmake"), "--build", folder / "build"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        stamp.write_text("")

    build_once(folder / "complete", configure_and_compile)
    return folder / "build"


@pytest.mark.slow
def test_cross_compiles_for_jetson(jetson_build, nvcc):
    library = jetson_build / "libinternimage_trt_plugins.so"
    header = subprocess.run(["readelf", "-h", library], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in header
    own = "internimage_plugin_built_for"
    assert exported(library) == {"setLoggerFinder", "getCreators", "getPluginCreators", own}
    register = jetson_build / "libinternimage_trt_register.so"
    assert exported(register) == set()
    assert needed(register) <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-aarch64", "libdl"}
    assert needed(library) <= {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "ld-linux-aarch64",
        "libpthread",
        "libdl",
        "librt",
    }
    # The fat binary names its code: Orin and, with CUDA 13, Thor.
    expected = {n for n in (72, 87, 101, 110) if n in nvcc.architectures}
    lines = (jetson_build / "build.ninja").read_text()
    assert all(f"code=[sm_{n}]" in lines or f"sm_{n}" in lines for n in expected)

# SPDX-License-Identifier: Apache-2.0
"""Tests with the marker `gpu` run where an NVIDIA GPU and their packages are; elsewhere they say what is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from internimage_deploy.cache import CACHE_VARIABLE, cache_folder
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.gpu.device import Device
from internimage_deploy.runtime.gpu.driver import gpu_problem

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))  # `import kernel_library`

# What the tests compile stays apart from the libraries that the user's engines are built with.
if CACHE_VARIABLE not in os.environ:
    os.environ[CACHE_VARIABLE] = str(cache_folder() / "tests")


def pytest_runtest_setup(item):
    """Skip the tests with the marker where there is no GPU."""
    if item.get_closest_marker("gpu") and (problem := gpu_problem()):
        pytest.skip(f"needs an NVIDIA GPU, and {problem}")


@pytest.fixture(scope="session")
def device():
    """The first GPU."""
    return Device()


@pytest.fixture(scope="session")
def kernel(device):
    """The CUDA kernel, compiled for the GPU."""
    from kernel_library import load_kernel

    from internimage_deploy.trt_plugins.toolchain import find_nvcc

    try:
        find_nvcc()
    except UserError as error:
        pytest.skip(f"needs nvcc: {error}")
    return load_kernel(device.capability)


@pytest.fixture(scope="session")
def trt():
    """The module `tensorrt`."""
    try:
        return load_module("tensorrt")
    except ImportError as error:
        pytest.skip(f"needs TensorRT ({error}): pip install 'internimage-deploy[gpu]'")


@pytest.fixture(scope="session")
def rtx(device):
    """TensorRT-RTX's module, on a GPU for which it compiles float32 models."""
    from internimage_deploy.runtime.engine.targets import RTX_TARGETS, TURING

    if device.capability not in RTX_TARGETS or device.capability == TURING:
        pytest.skip(f"needs a GPU that TensorRT-RTX supports, and {device.name} has {device.capability}")
    try:
        return load_module("tensorrt-rtx")
    except ImportError as error:
        pytest.skip(f"needs TensorRT-RTX ({error}): pip install 'internimage-deploy[rtx]'")


@pytest.fixture(scope="session")
def plugin(trt):
    """The plugin library for that TensorRT, compiled if the cache has none."""
    from internimage_deploy.trt_plugins.library import find_library

    try:
        return find_library(tensorrt=trt.__version__, build=True)
    except UserError as error:
        pytest.skip(f"needs the plugin library: {error}")

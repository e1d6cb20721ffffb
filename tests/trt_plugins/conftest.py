# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from internimage_deploy.cache import (
    CACHE_VARIABLE,
    build_once,
    cache_folder,
    fingerprint,
    run_compiler,
)
from internimage_deploy.trt_plugins import build, host_operators
from internimage_deploy.trt_plugins.build import SOURCES
from internimage_deploy.trt_plugins.toolchain import find_headers, find_nvcc
from support.plugin_driver import driving

# What the tests compile stays apart from the libraries that the user's engines are built with.
if CACHE_VARIABLE not in os.environ:
    os.environ[CACHE_VARIABLE] = str(cache_folder() / "tests")

# test_sanitizers.py runs these tests once more in a process that has the sanitizers' runtime.
SANITIZE = (
    ("-O1", "-g", "-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    if os.environ.get("PLUGIN_TEST_SANITIZERS")
    else ()
)
host_operators.FLAGS = (*host_operators.FLAGS, *SANITIZE)


@pytest.fixture(scope="session")
def headers():
    """TensorRT's headers; the ones of 10.14 from the wheel unless the machine has its own."""
    return find_headers()


@pytest.fixture(scope="session")
def nvcc():
    return find_nvcc()


@pytest.fixture(scope="session")
def plan():
    """The library the tests build: one architecture, for time."""
    return build.make_plan(architectures=[87])


@pytest.fixture(scope="session")
def plugin(plan):
    """The plugin library, compiled at most once per source state."""
    return build.build(plan)[0]


# The plugin without what needs a GPU, and the kernels' host versions in its place.
DRIVER_SOURCES = tuple(name for name in build.PLUGIN_SOURCES if not name.startswith("plugin/plugin_v")) + tuple(
    f"kernel/{name}" for name in host_operators.HOST_SOURCES
)


@pytest.fixture(scope="session")
def driver_library(headers, nvcc):
    """interface -> the plugin class with a stand-in for TensorRT around it and the host kernel under it."""
    return functools.cache(lambda interface: compile_driver(interface, headers, nvcc))


def compile_driver(interface, headers, nvcc):
    here = Path(__file__).parent / "cpp" / "driver.cpp"
    sources = [SOURCES / name for name in (*DRIVER_SOURCES, f"plugin/plugin_{interface}.cpp")] + [here]
    host_flags = ",".join(("-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations", *SANITIZE))
    command = [
        *(str(nvcc.path), "-std=c++17", "-O1", "-shared", "-Xcompiler", host_flags),
        *(f"-DPLUGIN_INTERFACE={interface[1]}", "-isystem", str(headers.path), f"-I{SOURCES}"),
        *("--threads", str(os.cpu_count()), *map(str, sources)),
    ]
    key = fingerprint([*SOURCES.rglob("*.h"), *sources], [*command, nvcc.version, headers.version])
    target = cache_folder() / "tests" / f"driver-{key}.so"
    build_once(target, lambda path: run_compiler([*command, "-o", str(path)], target.with_suffix(".log")))
    return target


@pytest.fixture(params=["v2", "v3"])
def driver(request, driver_library):
    with driving(driver_library, request.param) as made:
        yield made


@pytest.fixture
def v2(driver_library):
    """IPluginV2DynamicExt alone: it serialises to bytes of its own."""
    with driving(driver_library, "v2") as made:
        yield made


@pytest.fixture
def v3(driver_library):
    """IPluginV3 alone: it has tactics and onShapeChange."""
    with driving(driver_library, "v3") as made:
        yield made


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which the headers that were downloaded before are already there."""
    old = cache_folder() / "tensorrt-headers"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    if old.is_dir():
        (tmp_path / "cache").mkdir()
        os.symlink(old, tmp_path / "cache" / "tensorrt-headers")
    return Path(tmp_path / "cache")

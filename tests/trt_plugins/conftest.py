# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from internimage_deploy.trt_plugins import build
from internimage_deploy.trt_plugins.cache import CACHE_VARIABLE, cache_folder
from internimage_deploy.trt_plugins.toolchain import find_headers, find_nvcc


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


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which the headers that were downloaded before are already there."""
    old = cache_folder() / "tensorrt-headers"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    if old.is_dir():
        (tmp_path / "cache").mkdir()
        os.symlink(old, tmp_path / "cache" / "tensorrt-headers")
    return Path(tmp_path / "cache")

# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver's CUDA against the compiler's, and the GPUs that are compiled for."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import platform
from pathlib import Path

import pytest
from test_build import fake_headers, fake_nvcc

from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins import build, driver, library, toolchain


class Driver:
    """The calls of the driver's C API that are made, with `capabilities` of GPUs; it writes to addresses as C does."""

    def __init__(self, version, capabilities=()):
        self.version = version
        self.capabilities = capabilities

    @staticmethod
    def write(reference, value):
        reference._obj.value = value
        return 0

    def cuDriverGetVersion(self, number):
        return self.write(number, self.version)

    def cuInit(self, flags):
        assert flags == 0
        return 0 if self.capabilities else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count):
        return self.write(count, len(self.capabilities))

    def cuDeviceGet(self, device, index):
        return self.write(device, index)

    def cuDeviceGetAttribute(self, value, attribute, device):
        major, minor = self.capabilities[device.value]
        return self.write(value, {75: major, 76: minor}[attribute])


@pytest.fixture
def use_driver(monkeypatch):
    def use(*arguments):
        def opened(name):
            assert name == "libcuda.so.1"
            return Driver(*arguments)

        monkeypatch.setattr(driver.ctypes, "CDLL", opened)

    return use


def test_the_driver_is_asked_for_its_cuda_and_its_gpus(use_driver):
    use_driver(12060, [(8, 7), (12, 0), (8, 7)])
    assert driver.cuda_version() == (12, 6)
    assert driver.architectures() == (87, 120)
    use_driver(13000)
    assert driver.cuda_version() == (13, 0)
    assert driver.architectures() == ()


def test_no_driver_is_no_limit(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver.cuda_version() is None
    assert driver.architectures() == ()


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """No compilers but CUDA 13.0 on the PATH and what a test installs with `compilers(release)`."""
    first = fake_nvcc(tmp_path / "bin" / "nvcc", "13.0", r"sm_75\nsm_87\nsm_90\n")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{first.parent}:/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(toolchain, "_pypi_nvcc", list)
    return lambda release: fake_nvcc(
        tmp_path / "local" / f"cuda-{release}" / "bin" / "nvcc", release, r"sm_75\nsm_87\n"
    )


def test_a_compiler_that_is_too_new_for_the_driver_is_refused(compilers, use_driver, tmp_path):
    use_driver(12020)
    with pytest.raises(UserError) as caught:
        toolchain.find_nvcc()
    message = str(caught.value)
    assert "starts programs of CUDA 12.2 and older" in message
    assert f"{tmp_path}/bin/nvcc is CUDA 13.0" in message
    assert "install the CUDA 12 toolkit or a newer driver" in message
    assert "\n" not in message
    # Named outright it is taken: the library may be for another machine.
    assert toolchain.find_nvcc(tmp_path / "bin" / "nvcc").version == "13.0"


@pytest.mark.parametrize(("version", "expected"), [(12020, "12.9"), (13000, "13.0"), (13020, "13.0"), (14000, "13.0")])
def test_of_several_compilers_one_that_fits_the_driver_is_taken(compilers, use_driver, version, expected):
    compilers("11.8")
    compilers("12.9")  # a newer minor version than the driver's 12.2: its code for the GPU at hand starts there
    use_driver(version)
    assert toolchain.find_nvcc().version == expected


def test_without_a_driver_the_first_compiler_is_taken(compilers, monkeypatch):
    compilers("12.9")
    monkeypatch.setattr(driver, "cuda_version", lambda: None)
    assert toolchain.find_nvcc().version == "13.0"


@pytest.fixture
def new_headers(tmp_path, monkeypatch):
    folder = fake_headers(tmp_path / "headers" / "include", "11.1.0")
    monkeypatch.setenv("TENSORRT_ROOT", str(folder.parent))


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((87,), (87,)), ((87, 90), (87, 90)), ((), (75, 87, 90)), ((70, 87), (75, 87, 90))],
    ids=["one", "two", "none", "one that the compiler does not know"],
)
def test_a_library_that_a_command_needs_is_compiled_for_the_gpus_here(
    compilers, new_headers, monkeypatch, empty_cache, gpus, expected
):
    monkeypatch.setattr(driver, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(driver, "architectures", lambda: gpus)
    built = []

    def record(plan):
        built.append(plan)
        return Path("library.so"), True

    monkeypatch.setattr(build, "build", record)
    assert library.find_library(tensorrt="11.4.0", build=True) == Path("library.so")
    (plan,) = built
    assert plan.architectures == expected
    # build-plugin itself compiles for every GPU, as one may copy its library.
    assert build.make_plan() == dataclasses.replace(plan, architectures=(75, 87, 90))


@pytest.mark.parametrize(
    ("compiled", "gpu", "runs"),
    [
        ((87,), 87, True),
        ((86, 90), 89, True),  # code of the same major version and a lower minor one
        ((75, 89), 86, False),
        ((89,), 90, True),  # by PTX
        ((75, 90), 80, False),
    ],
)
def test_a_cached_library_without_code_for_the_gpu_here_is_not_the_one(
    compilers, new_headers, monkeypatch, empty_cache, compiled, gpu, runs
):
    folder = empty_cache / "plugin" / "cached"
    folder.mkdir(parents=True)
    (folder / build.LIBRARY).write_text("")
    record = {"sources": build.sources_key(), "machine": platform.machine(), "tensorrt": "11.1.0", "interface": "v3"}
    (folder / build.RECORD).write_text(json.dumps(record | {"architectures": compiled}))
    monkeypatch.setattr(driver, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(driver, "architectures", lambda: (gpu,))
    monkeypatch.setattr(build, "build", lambda plan: (Path("built.so"), True))
    found = library.find_library(tensorrt="11.4.0", build=True)
    assert found == (folder / build.LIBRARY if runs else Path("built.so"))

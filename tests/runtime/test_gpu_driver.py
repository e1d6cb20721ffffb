# SPDX-License-Identifier: Apache-2.0
"""The driver's functions against NVIDIA's header, and what is said where there is no driver or PyCUDA."""

import ctypes
import re
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from internimage_deploy.runtime.gpu import driver, layers
from support import fake_cuda

SIZES = {
    "int": 4,
    "unsigned int": 4,
    "float": 4,
    "size_t": 8,
    "unsigned long long": 8,
    "cuuint64_t": 8,
    "CUdeviceptr": 8,
    "CUdevice": 4,
    # Enumerations
    "CUresult": 4,
    "CUdevice_attribute": 4,
    "CUpointer_attribute": 4,
    "CUstreamCaptureMode": 4,
    # Pointers to structures that only the driver knows
    "CUcontext": 8,
    "CUstream": 8,
    "CUevent": 8,
    "CUgraph": 8,
    "CUgraphExec": 8,
}
"""Size in bytes of the C types in the header, on 64-bit systems."""


@cache
def header():
    """NVIDIA's cuda.h, of the compiler's package."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/include/cuda.h"))
    if not found:
        pytest.skip("needs cuda.h: pip install nvidia-cuda-runtime")
    return found[-1].read_text(encoding="utf-8")


def prototypes(name):
    """Argument types of the declarations of a function."""
    found = re.findall(rf"CUresult\s+CUDAAPI\s+{name}\(([^)]*)\)\s*;", header())
    return [[] if text.strip() == "void" else [_type(argument) for argument in text.split(",")] for text in found]


def _type(argument):
    """("unsigned int", 0 for a value, 1 for a pointer, 2 for a pointer to one)."""
    words = re.sub(r"\bconst\b", "", argument).replace("*", " * ").split()
    stars = words.count("*")
    words = [word for word in words if word != "*"]
    return " ".join(words[:-1]), stars  # without the name


def fits(expected, found):
    """Whether a ctypes argument type is passed as the header's type is, and points to as many bytes."""
    name, stars = found
    if stars == 0:
        return ctypes.sizeof(expected) == SIZES[name]
    if name in ("void", "char") and stars == 1:  # memory of any size
        return expected in (ctypes.c_void_p, ctypes.c_char_p)
    pointee = 8 if stars == 2 else SIZES[name]
    return ctypes.sizeof(expected) == 8 and ctypes.sizeof(expected._type_) == pointee


@pytest.mark.parametrize("symbol", driver.SIGNATURES)
def test_signatures_are_those_of_nvidias_header(symbol):
    base = symbol.removesuffix("_v2")
    base = {"cuGraphInstantiateWithFlags": "cuGraphInstantiate"}.get(base, base)
    alternatives = [p for p in prototypes(base) + prototypes(symbol) if len(p) == len(driver.SIGNATURES[symbol])]
    assert any(
        all(fits(*pair) for pair in zip(driver.SIGNATURES[symbol], declared, strict=True)) for declared in alternatives
    ), (symbol, alternatives)
    if symbol.endswith("_v2"):  # the header gives the plain name to this version; the plain symbol is of CUDA 3
        renamed = rf"#define {base}\s+(__CUDA_API_PTSZ\()?{symbol}\)?\s"
        assert re.search(renamed, header())


def test_codes_are_those_of_nvidias_header():
    documented = re.findall(r"/\*\*((?:(?!\*/).)*)\*/\s*CUDA_ERROR_\w+\s*=\s*(\d+)", header(), re.DOTALL)
    ending = {int(code) for text, code in documented if "process must be terminated" in " ".join(text.split())}
    ending |= {int(code) for text, code in documented if "process must be terminated" in re.sub(r"[\s*]+", " ", text)}
    assert len(ending) > 8
    assert ending - driver.STICKY <= {911}  # an error of a device that is no GPU
    for name, value in {
        "CU_STREAM_NON_BLOCKING": driver.STREAM_NON_BLOCKING,
        "CU_EVENT_DISABLE_TIMING": driver.EVENT_WITHOUT_TIME,
        "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": driver.CAPTURE_THREAD_LOCAL,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": driver.COMPUTE_CAPABILITY_MAJOR,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": driver.COMPUTE_CAPABILITY_MINOR,
        "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": driver.POINTER_DEVICE_ORDINAL,
        "CUDA_ERROR_OUT_OF_MEMORY": driver.OUT_OF_MEMORY,
    }.items():
        (text,) = re.findall(rf"\b{name}\s*=\s*(0x[0-9a-f]+|\d+)\b", header())
        assert int(text, 0) == value, name
    assert re.search(r"#define CU_STREAM_LEGACY\s+\(\(CUstream\)0x1\)", header())


def test_what_is_wrong_where_no_gpu_can_be_used(monkeypatch):
    gpu = fake_cuda.make_driver()
    monkeypatch.setattr(driver, "library", lambda: gpu)
    assert driver.gpu_problem() == ""
    gpu.devices = 0
    assert driver.gpu_problem() == "the NVIDIA driver sees no GPU"
    gpu.failing["cuInit"] = 803
    assert driver.gpu_problem() == "the NVIDIA driver does not start (cuInit returned 803)"

    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    def old():
        raise AttributeError("undefined symbol: cuGraphInstantiateWithFlags")

    monkeypatch.setattr(driver, "library", missing)
    assert driver.gpu_problem() == "no NVIDIA driver is installed here"
    monkeypatch.setattr(driver, "library", old)
    assert driver.gpu_problem().startswith("the NVIDIA driver is too old, it is of a CUDA before 11.4 (undefined")


def test_a_pycuda_that_does_not_load_is_told_and_not_needed(monkeypatch, caplog, tmp_path):
    """As one that was compiled for another CUDA."""
    fake_cuda.install(monkeypatch, fake_cuda.make_driver(), pycuda=False)
    assert layers.open_layer(0).name == "the driver's C API"
    assert caplog.text == ""
    package = tmp_path / "pycuda"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "driver.py").write_text("raise ImportError('libcurand.so.10: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "pycuda")
    monkeypatch.delitem(sys.modules, "pycuda.driver")
    monkeypatch.syspath_prepend(tmp_path)
    assert layers.open_layer(0).name == "the driver's C API"
    assert "PyCUDA does not load (libcurand.so.10: cannot open" in caplog.text

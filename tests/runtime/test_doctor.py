# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest

from internimage_deploy import UserError
from internimage_deploy.cli import doctor
from internimage_deploy.runtime.backends import availability
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.backends.registry import REGISTRY
from internimage_deploy.trt_plugins import driver
from support.tiny_models import color_model

GPU_ONLY = ("tensorrt", "pycuda")


def test_doctor_survives_broken_packages(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('lost\\na library')")
    (tmp_path / "leftover_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    part = doctor.Part("Broken", "broken_package", ("broken-package",), "pip install it", "tests", try_import=True)
    found = doctor.examine(part)
    assert (found.state, found.detail) == ("broken", "(RuntimeError: lost a library)")
    leftover = dataclasses.replace(part, module="leftover_package")
    assert doctor.examine(leftover).state == "missing"
    assert doctor.examine(dataclasses.replace(part, module="not_there_at_all")).state == "missing"
    monkeypatch.delitem(sys.modules, "broken_package", raising=False)


def test_doctor_shows_what_is_installed(run, monkeypatch):
    code, out, _ = run("doctor")
    assert code == 0
    assert np.__version__ in out
    assert "onnxruntime" in out
    monkeypatch.setattr(doctor, "_present", lambda module: module != "cv2")
    code, out, _ = run("doctor")
    assert code == 1
    assert "pip install opencv-python-headless" in out


@pytest.mark.parametrize("content", ["raise ImportError('no libcublas.so.12')", "x = 1"], ids=["import", "stub"])
def test_doctor_survives_a_broken_onnxruntime(run, tmp_path, monkeypatch, content):
    (tmp_path / "onnxruntime.py").write_text(content)
    importlib.import_module("onnxruntime")  # the real one, which is put back afterwards
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    _, out, _ = run("doctor", "--json")
    report = json.loads(out)
    (found,) = (part for part in report["parts"] if part["title"] == "ONNX Runtime")
    if "raise" in content:
        assert (found["state"], found["detail"]) == ("broken", "(ImportError: no libcublas.so.12)")
        assert "onnxruntime" not in report["backends"]
    assert "onnxruntime-cuda" not in report["backends"]


def last_line(text):
    return text.strip().splitlines()[-1].split(maxsplit=3)[-1].split(", ")


def test_doctor_without_a_gpu_sends_nobody_for_what_only_a_gpu_needs(run, monkeypatch):
    monkeypatch.setattr(doctor, "_gpu_problem", lambda: "no NVIDIA driver is installed here")
    present = doctor._present
    monkeypatch.setattr(doctor, "_present", lambda module: module.split(".")[0] not in GPU_ONLY and present(module))
    code, out, _ = run("doctor")
    assert code == 0
    assert "none usable: no NVIDIA driver is installed here" in out
    for words in ("[pycuda]", "[gpu]"):
        assert words not in out
    assert out.count("not needed here, without a GPU") == len(GPU_ONLY)
    assert last_line(out) == json.loads(run("doctor", "--json")[1])["backends"]
    assert not {"tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"} & set(last_line(out))


def test_doctor_with_a_gpu_names_what_that_gpu_needs(run, monkeypatch):
    monkeypatch.setattr(doctor, "_gpu_problem", lambda: "")
    monkeypatch.setattr(doctor, "_gpus", lambda: [doctor.Gpu("NVIDIA H100", "9.0", "580.1")])
    present = doctor._present
    monkeypatch.setattr(doctor, "_present", lambda module: module.split(".")[0] not in GPU_ONLY and present(module))
    code, out, _ = run("doctor")
    assert code == 0
    assert "NVIDIA H100, 9.0, 580.1" in out
    assert "install: pip install 'internimage-deploy[pycuda]'" in out
    assert "run: TensorRT-RTX does not run on Hopper (compute capability 9.0)" in out
    assert "tensorrt-rtx" not in last_line(out)
    report = json.loads(run("doctor", "--json")[1])
    devices = [{"name": "NVIDIA H100", "compute_capability": "9.0", "driver": "580.1"}]
    assert report["gpu"] == {"problem": "", "devices": devices}
    assert {"platform", "python", "internimage-deploy", "system", "cpus", "gpus", "driver's CUDA"} == set(
        report["system"]
    )


@pytest.mark.parametrize(
    ("version", "said"),
    [((12, 6), "12.6; the plugin must be compiled with CUDA 12 or older"), (None, "no NVIDIA driver")],
)
def test_doctor_says_which_cuda_the_driver_takes(run, monkeypatch, version, said):
    monkeypatch.setattr(driver, "cuda_version", lambda: version)
    assert json.loads(run("doctor", "--json")[1])["system"]["driver's CUDA"] == said
    assert f"driver's CUDA        {said}" in run("doctor")[1]


def test_an_engine_needs_no_package_besides_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setattr(availability, "installed", lambda entry: True)
    monkeypatch.setattr(availability.importlib, "import_module", lambda name: None)
    assert all(row.runs for row in availability.availabilities("", ["8.6"]))


def test_segment_takes_every_backend_that_doctor_names_and_no_other(run, tmp_path):
    usable = json.loads(run("doctor", "--json")[1])["backends"]
    model = color_model(tmp_path / "m.onnx", size=(64, 64))
    for name, entry in REGISTRY.items():
        if ".onnx" not in entry.suffixes:
            continue
        if name in usable:
            assert load_backend(model, name).run(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 3, 16, 16)
        else:
            with pytest.raises(UserError):
                load_backend(model, name)


def test_a_gpu_without_a_driver_is_seen(tmp_path):
    assert not doctor._has_nvidia_hardware(tmp_path / "nothing")
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "0x10de", "0x030200")):
        assert not doctor._has_nvidia_hardware(tmp_path)
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert doctor._has_nvidia_hardware(tmp_path)


def test_doctor_finds_a_part_inside_a_namespace(tmp_path, monkeypatch):
    """As cuda-python's: the folder `cuda` belongs to several distributions and is no package of its own."""
    part = doctor.Part("Bindings", "cuda.bindings", ("cuda-bindings",), "pip install it", "tests")
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    assert doctor.examine(part).state == "missing"
    (tmp_path / "cuda" / "bindings").mkdir()
    (tmp_path / "cuda" / "bindings" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert doctor.examine(part).state == "installed"

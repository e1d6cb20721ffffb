# SPDX-License-Identifier: Apache-2.0
"""The runtime installs, imports and segments where there is no torch, no TensorRT, no CUDA."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.tiny_models import color_model, picture

REPOSITORY = Path(__file__).parents[2]

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import internimage_deploy.runtime, internimage_deploy.trt_plugins
BARE = ("settings", "triton", "model_runner", "worker")  # of serving: what export-triton and the workers use
SERVE = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "python_multipart", "ray")
names = []
for package in (internimage_deploy.runtime, internimage_deploy.trt_plugins):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # The service alone may need its extra; and then nothing but that.
            service = module.name.split(".")[2] in ("serving", "cluster") and module.name.split(".")[-1] not in BARE
            if not service or error.name not in SERVE:
                raise
        else:
            names.append(module.name)
print(json.dumps(names))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The Python of an environment with nothing but the package, its dependencies and the extra `cpu`."""
    folder = tmp_path_factory.mktemp("bare")
    # A copy, because building leaves its traces in the tree.
    source = folder / "source"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".*", "tests", "out", "build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    constraints = REPOSITORY / "constraints.txt"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints, f"{source}[cpu]"]
    subprocess.run(install, check=True, env=environment())
    return python


def environment():
    """Without anything that would let the environment see packages of the one that runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run(python, *arguments, **options):
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=python.parent, **options)


@pytest.mark.slow
def test_nothing_heavy_is_installed(bare):
    listed = run(bare, "-m", "pip", "list", "--format=json", check=True).stdout
    installed = {entry["name"].lower() for entry in json.loads(listed)}
    assert {"internimage-deploy", "onnxruntime"} <= installed
    heavy = ("torch", "onnxruntime-gpu", "tensorrt", "nvidia", "cuda", "pycuda", "onnxscript")
    assert [name for name in installed if name.startswith(heavy)] == []


@pytest.mark.slow
def test_every_module_of_the_runtime_imports(bare):
    result = run(bare, "-c", IMPORT_EVERYTHING)
    assert result.returncode == 0, result.stderr
    names = json.loads(result.stdout)
    assert "internimage_deploy.runtime.segmenter" in names
    assert "internimage_deploy.runtime.backends.onnxruntime" in names


@pytest.mark.slow
def test_an_image_is_segmented(bare, tmp_path):
    image, expected = picture(60, 90)
    Image.fromarray(image).save(tmp_path / "a.png")
    model = color_model(tmp_path / "m.onnx")
    result = run(bare, "-m", "internimage_deploy", "segment", model, tmp_path / "a.png", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (np.asarray(Image.open(tmp_path / "out" / "a.labels.png")) == expected).mean() > 0.9


@pytest.mark.slow
def test_class_tables_are_part_of_the_package(bare):
    code = (
        "from internimage_deploy.datasets.classes import DATASETS, lookup; print([len(lookup(d)[0]) for d in DATASETS])"
    )
    assert sorted(json.loads(run(bare, "-c", code, check=True).stdout)) == [19, 40, 59, 66, 150, 171]


@pytest.mark.slow
def test_doctor_names_what_is_missing(bare):
    result = run(bare, "-m", "internimage_deploy", "doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    parts = {part["title"]: part for part in report["parts"]}
    assert parts["ONNX Runtime"]["state"] == "installed"
    assert parts["PyTorch"]["state"] == "missing"
    assert parts["PyTorch"]["install"] == "pip install 'internimage-deploy[export]'"
    assert report["backends"] == ["onnxruntime"]

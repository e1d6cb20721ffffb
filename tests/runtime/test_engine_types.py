# SPDX-License-Identifier: Apache-2.0
"""The TensorRT path, type-checked with mypy against NVIDIA's type stubs."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_tensorrt import stub_file

REPOSITORY = Path(__file__).parents[2]
CHECKED = tuple(
    f"internimage_deploy/runtime/{name}.py" for name in ("engine/compile", "gpu/execution_context", "backends/tensorrt")
)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Errors that mypy finds in files, those inside the stubs left out."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("tensorrt/__init__.pyi", "tensorrt_bindings/__init__.pyi", "tensorrt_bindings/tensorrt.pyi"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(stub_file(name))

    def check(*files):
        settings = ["--config-file", str(REPOSITORY / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
        result = subprocess.run(
            [sys.executable, "-m", "mypy", *settings, *map(str, files)],
            cwd=REPOSITORY,
            env={"MYPYPATH": str(folder), "PATH": ""},
            capture_output=True,
            text=True,
        )
        lines = result.stdout.splitlines()
        assert lines[-1].startswith(("Found", "Success")), result.stdout + result.stderr
        return [line for line in lines if ": error:" in line and not line.startswith(str(folder))]

    return check


def test_every_name_and_argument_is_known(check):
    assert check(*CHECKED) == []


def test_a_wrong_name_and_a_wrong_argument_would_be_found(check, tmp_path):
    text = (REPOSITORY / CHECKED[1]).read_text()
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace(".set_tensor_address(", ".set_address(").replace("infer_shapes()", "infer_shapes(1)"))
    errors = "\n".join(check(wrong))
    assert '"IExecutionContext" has no attribute "set_address"' in errors
    assert 'Too many arguments for "infer_shapes"' in errors

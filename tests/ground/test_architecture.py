# SPDX-License-Identifier: Apache-2.0
"""The room rule and the types are really checked: each planted mistake is found, and the tree itself is clean."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINT = REPOSITORY / "tools" / "check_imports.py"
ROOMS = ("exporter", "trt_plugins", "runtime")


def check_imports(root):
    return subprocess.run([sys.executable, str(LINT), str(root)], capture_output=True, text=True)


@pytest.fixture
def package(tmp_path):
    """A package of the real one's shape, with a module in each room."""
    root = tmp_path / "internimage_deploy"
    for name in ("__init__", "errors", "cli/__init__", "cli/main", "cli/segment"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").touch()
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "part.py").write_text("from internimage_deploy import errors\n")
        (root / room).symlink_to(f"../{room}")
    return root


def test_this_repository_follows_the_rules():
    result = check_imports(REPOSITORY / "internimage_deploy")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("errors", "from internimage_deploy.runtime import part", "errors:1: ground must not import runtime"),
        ("exporter/part", "from internimage_deploy.runtime.part import x", "exporter.part:1: exporter must not import"),
        ("exporter/part", "def f():\n    import tensorrt", "exporter.part:2: exporter must not import tensorrt"),
        ("trt_plugins/part", "import torch", "trt_plugins.part:1: trt_plugins must not import torch"),
        ("runtime/part", "import torch.nn as nn", "runtime.part:1: runtime must not import torch"),
        ("runtime/part", "from internimage_deploy.cli import main", "runtime.part:1: runtime must not import api"),
        ("runtime/part", "import exporter", "runtime.part:1: write internimage_deploy.exporter"),
        ("runtime/part", "from .. import exporter", "runtime.part:1: write internimage_deploy....; relative imports"),
        ("cli/main", "from internimage_deploy.runtime import part", "cli.main:1: api imports runtime inside functions"),
    ],
)
def test_a_breach_is_found(package, module, text, found):
    (package / f"{module}.py").write_text(text + "\n")
    result = check_imports(package)
    assert result.returncode == 1
    assert found in result.stderr


def test_a_circle_is_found(package):
    (package / "errors.py").write_text("from internimage_deploy import files\n")
    (package / "files.py").write_text("def f():\n    from internimage_deploy.errors import x\n")
    assert "import circle: errors -> files -> errors" in check_imports(package).stderr


def test_runtime_layers_point_one_way(package):
    for layer in ("imaging", "serving"):
        (package / "runtime" / layer).mkdir()
    (package / "runtime" / "serving" / "batch.py").write_text("from internimage_deploy.runtime.imaging import resize\n")
    (package / "runtime" / "imaging" / "resize.py").touch()
    assert check_imports(package).returncode == 0
    (package / "runtime" / "imaging" / "resize.py").write_text("from internimage_deploy.runtime.serving import batch\n")
    assert "runtime/imaging lies below runtime/serving" in check_imports(package).stderr


def test_commands_may_use_the_rooms(package):
    (package / "cli" / "segment.py").write_text("from internimage_deploy.runtime import part\n")
    (package / "cli" / "main.py").write_text("def f():\n    from internimage_deploy.cli import segment\n")
    result = check_imports(package)
    assert (result.returncode, result.stderr) == (0, "")


def test_mypy_sees_across_the_rooms(tmp_path):
    """What another room exports has its type: a wrong attribute or argument is an error, not `Any`."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from internimage_deploy.card import ModelCard\n"
        "from internimage_deploy.exporter.options import ExportOptions\n"
        "from internimage_deploy.runtime.segmenter import Segmenter\n"
        "from internimage_deploy.trt_plugins.build import make_plan\n"
        "def use(card: ModelCard, segmenter: Segmenter) -> None:\n"
        "    card.no_such_attribute\n"
        "    segmenter.card.no_such_attribute\n"
        "    ModelCard(nonsense=1)\n"
        "    ExportOptions(nonsense=1)\n"
        "    make_plan(nonsense=1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), str(planted)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    lines = [int(line.split(":")[1]) for line in result.stdout.splitlines() if line.startswith(str(planted))]
    assert set(lines) >= {6, 7, 8, 9, 10}, result.stdout + result.stderr

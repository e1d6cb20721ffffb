# SPDX-License-Identifier: Apache-2.0
"""The README's commands exist, and those of its first steps run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import cv2
import numpy as np
import pytest

from internimage_deploy.cli.main import COMMANDS, LazyGroup, group

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
OURS = ("internimage-deploy", "export-onnx", "build-engine")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def commands(text: str) -> list[str]:
    """The shell commands in fenced blocks, comments cut off, lines that go on joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.startswith(OURS)]


def arguments(line: str) -> list[str]:
    """The words after `internimage-deploy`; the two commands with entry points of their own keep their names."""
    words = shlex.split(line)
    return words[1:] if words[0] == "internimage-deploy" else words


def test_every_command_line_is_found():
    assert len(commands(TEXT)) == sum(line.startswith(OURS) for line in TEXT.splitlines())


@pytest.mark.parametrize("line", sorted(set(commands(TEXT))))
def test_commands_and_options_exist(line):
    name, *words = arguments(line)
    assert name in COMMANDS
    command = LazyGroup().get_command(click.Context(group), name)
    command.make_context(name, words)  # click.UsageError for what it does not take


def test_the_first_steps_run_word_for_word(tmp_path):
    """Quick start and "Segment pictures", with the demo's model under the official file's name."""
    checkpoint = ROOT / "examples" / "toy_street" / "toy_street.pth"
    shutil.copy(checkpoint, tmp_path / "upernet_internimage_t_512_160k_ade20k.pth")
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for path in (tmp_path / "street.jpg", tmp_path / "pictures" / "one.png"):
        cv2.imwrite(str(path), rng.integers(0, 256, (64, 96, 3), np.uint8))
    lines = commands(section("Quick start")) + commands(section("Segment pictures"))
    assert sum("segment" in line for line in lines) >= 2
    for line in lines:
        if "other.onnx" in line:
            shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
        run = [sys.executable, "-m", "internimage_deploy", *arguments(line)]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    labels = cv2.imread(str(tmp_path / "out" / "street.labels.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (64, 96)
    assert (tmp_path / "out" / "one.overlay.png").exists()
    code = re.search(r"```python\n(.*?)```", section("Python API"), re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_that_the_readme_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []

# SPDX-License-Identifier: Apache-2.0
"""Every command in the documents exists, and those that need no GPU, cluster or download run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys

import click
import cv2
import numpy as np
import pytest

from internimage_deploy.cli.main import COMMANDS, LazyGroup, group
from support.documents import DOCUMENTS, ROOT, commands, section

OURS = ("internimage-deploy", "export-onnx", "build-engine")
ALL = sorted({line for text in DOCUMENTS.values() for line in commands(text, OURS)})
# Documents and their sections whose commands run, in this order, in one folder: the first export serves all of them.
RUN = (
    ("README.md", "Quick start"),
    ("docs/segment.md", None),
    ("docs/evaluate.md", None),
    ("docs/serving.md", "Triton Inference Server"),
)
# Taken by other tests: the service runs until it is stopped (tests/serving/test_http.py).
NOT_RUN = "internimage-deploy serve"
# Options of other programs that the documents name.
FOREIGN = {"--backend-config", "--dynamicPlugins", "--index-url", "--staticPlugins", "--strict"}


def arguments(line):
    """The words after `internimage-deploy`; the two commands with entry points of their own keep their names."""
    words = shlex.split(line)
    return words[1:] if words[0] == "internimage-deploy" else words


def command_named(name):
    return LazyGroup().get_command(click.Context(group), name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_is_found(document):
    text = DOCUMENTS[document]
    assert len(commands(text, OURS)) == sum(line.startswith(OURS) for line in text.splitlines())


@pytest.mark.parametrize("line", ALL)
def test_commands_and_options_exist(line):
    name, *words = arguments(line)
    assert name in COMMANDS
    command_named(name).make_context(name, words)  # click.UsageError for what it does not take


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name):
    command = command_named(name)
    text = command.get_help(click.Context(command, info_name=name))
    lines = [line.strip() for line in text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()]
    assert len(lines) >= 2
    for line in lines:
        assert line.startswith(OURS)
        shown, *words = arguments(line.partition(" > ")[0])
        assert shown == name
        command.make_context(name, words)  # click.UsageError for what it does not take


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_options_named_in_the_text_exist(document):
    known = {
        option
        for name in COMMANDS
        for parameter in command_named(name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    scripts = "".join(path.read_text() for folder in ("tools", "examples", "benchmarks") for path in _scripts(folder))
    named = {option for code in re.findall(r"`([^`\n]+)`", DOCUMENTS[document]) for option in _options(code)}
    assert {option for option in named - known - FOREIGN if f'"{option}"' not in scripts} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    used = {words[1] for words in map(str.split, commands(DOCUMENTS[document], ("make ",)))}
    used |= set(re.findall(r"`make ([a-z-]+)`", DOCUMENTS[document]))
    assert [target for target in used if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_the_makefile_names_the_folders_that_the_scenes_are_painted_into(tmp_path):
    painter = ROOT / "examples" / "toy_street" / "scenes.py"
    _run([sys.executable, str(painter), str(tmp_path), "--count", "1"], tmp_path, "scenes.py")
    named = set(re.findall(r"/scenes/(\w+)", (ROOT / "Makefile").read_text()))
    assert named
    assert named <= {folder.name for folder in tmp_path.iterdir()}


def test_the_commands_run_word_for_word(tmp_path):
    """With the demo's model under the official file's name, and images of noise."""
    checkpoint = ROOT / "examples" / "toy_street" / "toy_street.pth"
    shutil.copy(checkpoint, tmp_path / "upernet_internimage_t_512_160k_ade20k.pth")
    rng = np.random.default_rng(0)
    for name in ("street.jpg", "images/one.png", "day1/a.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (64, 96, 3), np.uint8))
    (tmp_path / "list.txt").write_text("street.jpg\n")
    painter = ROOT / "examples" / "toy_street" / "scenes.py"
    _run([sys.executable, str(painter), str(tmp_path / "val"), "--count", "2"], tmp_path, "scenes.py")
    texts = [DOCUMENTS[name] if title is None else section(DOCUMENTS[name], title) for name, title in RUN]
    lines = [line for text in texts for line in commands(text, OURS) if not line.startswith(NOT_RUN)]
    assert {arguments(line)[0] for line in lines} >= {
        "export-onnx", "segment", "evaluate", "info", "verify", "doctor", "benchmark", "export-triton",
    }  # fmt: skip
    for line in lines:
        if "other.onnx" in line:
            shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
        _run([sys.executable, "-m", "internimage_deploy", *arguments(line)], tmp_path, line)
    labels = cv2.imread(str(tmp_path / "out" / "street.labels.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape[:2] == (64, 96)
    assert (tmp_path / "out" / "one.overlay.png").exists()
    for document in ("docs/segment.md", "docs/evaluate.md"):
        (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTS[document], re.S)
        _run([sys.executable, "-c", code], tmp_path, f"the Python of {document}")


def _run(command, folder, what):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{what}\n{done.stdout}{done.stderr}"


def _scripts(folder):
    return (ROOT / folder).rglob("*.py")


def _options(code):
    """Long options in inline code, which shows one of ours or part of a command line."""
    return re.findall(r"(?<![\w-])--[a-zA-Z][\w-]+", code)

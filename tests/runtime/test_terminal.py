# SPDX-License-Identifier: Apache-2.0
"""Names of files may hold control characters; what commands print about them must not reach a terminal as such."""

import shutil

import pytest
from click.testing import CliRunner

from internimage_deploy.cli.main import group
from support.served import encoded
from support.tiny_models import color_model, picture

EVIL = "a\x1b]0;title\x07\x1b[31m\u202eb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    color_model(folder / f"{EVIL}.onnx")
    shutil.copy(folder / f"{EVIL}.onnx", folder / "plain.onnx")
    (folder / "images").mkdir()
    for kind in ("PNG", "BMP"):
        (folder / "images" / f"{EVIL}.{kind.lower()}").write_bytes(encoded(picture(16, 24)[0], kind))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["info", f"{EVIL}.onnx"],
        ["verify", f"{EVIL}.onnx", "--size", "32x64"],
        ["verify", f"{EVIL}.onnx", "--against", "plain.onnx", "--images", "images"],
        ["segment", f"{EVIL}.onnx", "images", "-o", "out"],
    ],
    ids=["info", "verify", "comparison", "segment"],
)
def test_names_reach_no_terminal_as_they_are(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 0, result.output
    assert not set("\x1b\x07\u202e") & set(result.output)
    assert "\\x1b[31m" in result.output

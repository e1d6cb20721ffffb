# SPDX-License-Identifier: Apache-2.0
import pytest

from internimage_deploy.cli import main as cli
from support.engine_stand_in import compile_here  # noqa: F401 - a fixture
from support.exports import exports  # noqa: F401 - a fixture
from support.tiny_models import color_model


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.run(cli.group, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def model(tmp_path):
    """A model of free size whose labels are known: the class is the strongest colour."""
    return color_model(tmp_path / "model.onnx")

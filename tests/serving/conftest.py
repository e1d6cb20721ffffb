# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime")]  # served; tiny_models

from served import Served  # noqa: E402
from tiny_models import color_model  # noqa: E402


@pytest.fixture(scope="session")
def color_path(tmp_path_factory):
    """A model of free size whose answer is known: the class is the strongest colour."""
    return color_model(tmp_path_factory.mktemp("model") / "color.onnx")


@pytest.fixture(scope="module")
def server(color_path, tmp_path_factory):
    """The service as a process of its own, with short time limits."""
    with Served(color_path, tmp_path_factory.mktemp("server"), "--body-timeout", "1", "--max-body", "4") as running:
        yield running

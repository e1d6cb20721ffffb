# SPDX-License-Identifier: Apache-2.0
import pytest

from support.served import Served
from support.tiny_models import color_model


@pytest.fixture(scope="session")
def color_path(tmp_path_factory):
    """A model of free size whose answer is known: the class is the strongest colour."""
    return color_model(tmp_path_factory.mktemp("model") / "color.onnx")


@pytest.fixture(scope="module")
def server(color_path, tmp_path_factory):
    """The service as a process of its own, with short time limits."""
    with Served(color_path, tmp_path_factory.mktemp("server"), "--body-timeout", "1", "--max-body", "4") as running:
        yield running

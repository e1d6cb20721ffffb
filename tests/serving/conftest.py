# SPDX-License-Identifier: Apache-2.0
import pytest

from support.served import Served
from support.tiny_models import color_model


@pytest.fixture(scope="session")
def color_path(tmp_path_factory):
    """A model of free size whose labels are known: the class is the strongest colour."""
    return color_model(tmp_path_factory.mktemp("model") / "color.onnx")


@pytest.fixture(scope="session")
def server(color_path, tmp_path_factory):
    """The service as a process of its own, for every test that leaves it as it was."""
    with Served(color_path, tmp_path_factory.mktemp("server"), "--max-body", "4") as running:
        yield running


@pytest.fixture(scope="session")
def impatient_server(color_path, tmp_path_factory):
    """A service that closes connections whose headers or body take longer than two seconds."""
    with Served(color_path, tmp_path_factory.mktemp("impatient"), "--body-timeout", "2") as running:
        yield running

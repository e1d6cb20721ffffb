# SPDX-License-Identifier: Apache-2.0
import logging
import tempfile

import numpy as np
import pytest

from internimage_deploy.onnx_tools.model_file import read_model
from internimage_deploy.runtime.backends import cpu_graph, onnxruntime
from internimage_deploy.runtime.backends.fastest import sample
from support.tiny_models import color_model


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files; nine weights are worth a place in a file, the four scales of a Resize are not."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(onnxruntime, "_INLINE_BYTES", 60)
    return folder


def run(path):
    backend = onnxruntime.load(path, threads=1)
    return backend.run(sample(backend.card, (64, 96)))


@pytest.fixture
def expected(tmp_path, monkeypatch):
    path = color_model(tmp_path / "expected.onnx", labels=True)
    assert cpu_graph.adapt(read_model(path)) == 1
    with monkeypatch.context() as plain:
        plain.setattr(cpu_graph, "adapt", lambda model: 0)
        labels = run(path)
    assert len(np.unique(labels)) == 3
    return labels


def test_weights_pass_through_a_temporary_file(tmp_path, temporary, expected, monkeypatch):
    seen = []
    move = onnxruntime._move_weights

    def moved(model, folder):
        move(model, folder)
        seen.extend((path.parent, path.stat().st_size) for path in folder.iterdir())

    monkeypatch.setattr(onnxruntime, "_move_weights", moved)
    np.testing.assert_array_equal(run(color_model(tmp_path / "model.onnx", labels=True)), expected)
    ((folder, size),) = seen
    assert folder.parent == temporary
    assert size > 0
    assert not list(temporary.iterdir())


def test_weights_in_a_file_of_their_own_stay_there(tmp_path, temporary, expected, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = color_model(tmp_path / "model.onnx", labels=True, external=True)
    assert len(list(tmp_path.glob("model*"))) == 2
    np.testing.assert_array_equal(run(path), expected)


def test_without_room_for_the_weights_the_file_is_run_as_it_is(tmp_path, temporary, expected, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with caplog.at_level(logging.WARNING):
        labels = run(color_model(tmp_path / "model.onnx", labels=True))
    np.testing.assert_array_equal(labels, expected)
    assert "runs slower than it could" in caplog.text

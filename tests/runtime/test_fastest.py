# SPDX-License-Identifier: Apache-2.0
import logging
import os
import shutil

import click
import numpy as np
import pytest
from click.testing import CliRunner

from internimage_deploy.cli.options import backend_option
from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.backends import fastest
from internimage_deploy.runtime.backends.fastest import load_fastest, sample
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.backends.registry import installed
from internimage_deploy.timing import summary
from support.tiny_models import color_model

NAMES = ("onnxruntime", "openvino")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two backends whose runs take `milliseconds`, None for one that cannot load the file; `loaded` lists the loads."""
    path = color_model(tmp_path / "model.onnx")
    card = read_card(path)
    milliseconds = {"onnxruntime": 50.0, "openvino": 30.0}
    loaded = []

    class Fake:
        def __init__(self, name):
            self.name, self.card = name, card

        def run(self, batch):
            clock["ms"] += milliseconds[self.name]

        def close(self):
            pass

    def measure(calls, *, runs, warmup):
        """Like `timing.measure`, by the clock that `run` moves."""
        assert (list(calls), runs, warmup) == (["run"], 3, 1)
        times = []
        for _ in range(runs):
            start = clock["ms"]
            calls["run"]()
            times.append(clock["ms"] - start)
        return {"run": summary(times)}

    def load(path, name, *, threads=None, window=None):
        loaded.append(name)
        if milliseconds[name] is None:
            raise UserError(f"{name} cannot")
        return Fake(name)

    clock = {"ms": 0.0}
    monkeypatch.setattr(fastest, "open_backend", load)
    monkeypatch.setattr(fastest, "measure", measure)
    monkeypatch.setattr(fastest, "_key", lambda *about: repr(about))  # no need of both packages
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    return path, milliseconds, loaded


def test_the_faster_backend_is_loaded_and_named(machine, caplog):
    path, _, _ = machine
    with caplog.at_level(logging.INFO, "internimage_deploy"):
        assert load_fastest(path, NAMES).name == "openvino"
    assert "timing onnxruntime and openvino for this model at 512x512, once; this takes about " in caplog.text
    assert "onnxruntime 50 ms, openvino 30 ms a run at 512x512; from now on 'auto' takes openvino" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "internimage_deploy"):
        assert load_fastest(path, NAMES).name == "openvino"
    assert caplog.text == ""  # said once


def test_timings_are_cached_for_the_same_model_and_settings_only(machine):
    path, milliseconds, loaded = machine
    load_fastest(path, NAMES)
    milliseconds["onnxruntime"] = 21.0  # the faster one now, but the cache holds the old time
    loaded.clear()
    assert load_fastest(path, NAMES).name == "openvino"
    assert loaded == ["openvino"]
    assert load_fastest(path, NAMES, threads=1).name == "onnxruntime"


@pytest.mark.parametrize(("other", "expected"), [(49.0, "onnxruntime"), (46.0, "onnxruntime"), (44.0, "openvino")])
def test_a_tie_takes_the_default(machine, other, expected):
    path, milliseconds, _ = machine
    milliseconds["openvino"] = other
    for _ in range(2):  # timed, and from the cache
        assert load_fastest(path, NAMES).name == expected


def test_forgotten_timings_are_taken_again(machine):
    path, milliseconds, _ = machine
    assert load_fastest(path, NAMES).name == "openvino"
    milliseconds["openvino"] = 70.0
    assert load_fastest(path, NAMES).name == "openvino"
    CliRunner().invoke(click.command()(backend_option(lambda backend: None)), ["--retime"], catch_exceptions=False)
    assert load_fastest(path, NAMES).name == "onnxruntime"
    fastest.forget_times()
    fastest.forget_times()  # nothing left to remove


def test_a_quick_network_is_not_compared(machine):
    path, milliseconds, loaded = machine
    milliseconds["onnxruntime"] = 1.0
    assert load_fastest(path, NAMES).name == "onnxruntime"
    assert loaded == ["onnxruntime"]


def test_a_candidate_that_cannot_load_the_file_is_left_out(machine, caplog):
    path, milliseconds, _ = machine
    milliseconds["openvino"] = None
    with caplog.at_level(logging.INFO, "internimage_deploy"):
        assert load_fastest(path, NAMES).name == "onnxruntime"
    assert "openvino is left out: openvino cannot" in caplog.text


def test_a_file_that_the_first_cannot_load_is_refused(machine):
    path, milliseconds, _ = machine
    milliseconds["onnxruntime"] = None
    with pytest.raises(UserError, match="onnxruntime cannot"):
        load_fastest(path, NAMES)


@pytest.mark.parametrize("content", ["", "[1]", '{"a"', "null"])
def test_a_damaged_cache_is_replaced(machine, tmp_path, content):
    path, _, loaded = machine
    cache = tmp_path / "cache" / "fastest.json"
    cache.parent.mkdir()
    cache.write_text(content)
    load_fastest(path, NAMES)
    loaded.clear()
    load_fastest(path, NAMES)
    assert loaded == ["openvino"]


def test_without_a_writable_cache_the_first_is_used(machine, tmp_path, monkeypatch):
    path, _, loaded = machine
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "file" / "below"))
    assert load_fastest(path, NAMES).name == "onnxruntime"
    assert loaded == ["onnxruntime"]


def test_a_changed_file_is_timed_again(tmp_path):
    path = color_model(tmp_path / "model.onnx")
    key = fastest._key(path, NAMES[:1], None)
    assert fastest._key(path, NAMES[:1], None) == key
    path.write_bytes(path.read_bytes() + b" ")
    assert fastest._key(path, NAMES[:1], None) != key


def test_a_copy_elsewhere_is_the_same_model(tmp_path):
    path = color_model(tmp_path / "model.onnx")
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(path, tmp_path / "elsewhere" / "other.onnx")
    os.utime(copy, (1, 1))
    assert fastest._key(copy, NAMES[:1], None) == fastest._key(path, NAMES[:1], None)
    assert fastest._key(copy, NAMES[:1], 1) != fastest._key(copy, NAMES[:1], 2)


def test_the_digest_reads_both_ends_of_a_file(tmp_path):
    path = tmp_path / "large"
    content = bytearray(3 * fastest._SAMPLED_BYTES)
    digests = set()
    for changed in (None, 0, len(content) - 1):
        if changed is not None:
            content[changed] += 1
        path.write_bytes(content)
        digests.add(fastest._file_digest(path))
    assert len(digests) == 3


def test_noise_has_the_shape_that_the_card_asks_for(tmp_path):
    fixed = read_card(color_model(tmp_path / "fixed.onnx", size=(64, 96), batch=2, uint8=False))
    assert sample(fixed, (32, 32), 5).shape == (2, 3, 64, 96)
    free = read_card(color_model(tmp_path / "free.onnx"))
    assert sample(free, (32, 64), 5).shape == (5, 32, 64, 3)
    assert sample(free).dtype == np.uint8


@pytest.mark.skipif(
    not all(installed(fastest.REGISTRY[name]) for name in NAMES), reason="needs onnxruntime and openvino"
)
def test_auto_times_the_real_ones(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fastest, "_QUICK_MS", 0.0)
    monkeypatch.setenv("INTERNIMAGE_DEPLOY_CACHE", str(tmp_path / "cache"))
    path = color_model(tmp_path / "model.onnx")
    with caplog.at_level(logging.INFO, "internimage_deploy"):
        backend = load_backend(path)
    assert f"from now on 'auto' takes {backend.name}" in caplog.text
    assert all(name in caplog.text for name in NAMES)
    batch = sample(backend.card, (64, 64))
    np.testing.assert_allclose(backend.run(batch), load_backend(path, "onnxruntime").run(batch), atol=1e-3)

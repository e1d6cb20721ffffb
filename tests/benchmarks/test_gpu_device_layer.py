# SPDX-License-Identifier: Apache-2.0
"""The checks of benchmarks/gpu/device_layer.py on stand-ins for CUDA: they pass there, and see what goes wrong."""

import ctypes

import device_layer
import numpy as np
import pytest
from rows import OK, WRONG

from support import fake_cuda

# Four threads at a time, and arrays of other libraries, need a GPU.
CHECKS = (
    device_layer.recorded_and_replayed,
    device_layer.shapes_in_turns,
    device_layer.growing,
    device_layer.two_in_flight,
    device_layer.timed_parts,
    device_layer.closed_with_live_arrays,
    device_layer.nothing_leaks,
)


def floats(address, count):
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A stand-in for a GPU; the kernel's work is put on its streams."""

    def launch(x, y, count, stream):
        fake_cuda.STREAMS[stream].put(lambda: np.copyto(floats(y, count), 2 * floats(x, count) + 1))

    made = fake_cuda.make_driver()
    fake_cuda.install(monkeypatch, made)
    monkeypatch.setattr(device_layer, "launcher", lambda: launch)
    device_layer.device.cache_clear()
    yield made
    device_layer.device.cache_clear()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_check_passes(check):
    row = check()
    assert row["status"] == OK, row


def test_what_is_wrong_is_seen(monkeypatch):
    right = device_layer.launcher()
    monkeypatch.setattr(device_layer, "launcher", lambda: lambda x, y, count, stream: right(x, y, count - 1, stream))
    for check in (device_layer.recorded_and_replayed, device_layer.two_in_flight, device_layer.growing):
        assert check()["status"] == WRONG


def test_a_graph_that_is_never_captured_is_seen(monkeypatch):
    monkeypatch.setattr(device_layer.ExecutionContext, "_run", device_layer.ExecutionContext._enqueue)
    row = device_layer.recorded_and_replayed()
    assert row["status"] == WRONG
    assert row["enqueued"] == 20


def test_memory_that_is_never_freed_is_seen(monkeypatch):
    monkeypatch.setattr(device_layer.ExecutionContext, "close", lambda self: None)
    assert device_layer.nothing_leaks()["status"] == WRONG

# SPDX-License-Identifier: Apache-2.0
import signal
import time

import pytest

from internimage_deploy.exporter.interrupt import repeat_keyboard_interrupt


@pytest.fixture(autouse=True)
def default_handler():
    """Python's own, which a test run in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return


def swallow_and_work_on(seconds):
    with repeat_keyboard_interrupt():
        swallow()
        time.sleep(seconds)


def test_a_swallowed_interrupt_comes_again():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        swallow_and_work_on(seconds=60)
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_never_arrives_is_raised_on_leaving():
    with pytest.raises(KeyboardInterrupt):
        swallow_and_work_on(seconds=0)


def test_without_an_interrupt_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    with repeat_keyboard_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is before

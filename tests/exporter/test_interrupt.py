# SPDX-License-Identifier: Apache-2.0
import signal
import time

import pytest

from internimage_deploy.exporter.interrupt import insistent_interrupt


def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return


def swallow_and_work_on(seconds):
    with insistent_interrupt():
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
    with insistent_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is before

# SPDX-License-Identifier: Apache-2.0
"""In processes of their own: an interrupt that comes too late would end the one that runs the tests."""

import signal
import subprocess
import sys

import pytest

from internimage_deploy.exporter.interrupt import repeat_keyboard_interrupt

SCRIPT = """
import signal, sys, time
from internimage_deploy.exporter.interrupt import repeat_keyboard_interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background of a shell does not have

def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return

try:
    with repeat_keyboard_interrupt():
        swallow()
        time.sleep(float(sys.argv[1]))
        print("the work is done")
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize("seconds", [3600, 0], ids=["comes again", "is raised on leaving at the latest"])
def test_a_swallowed_interrupt(seconds):
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(seconds)], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-2:] == ["interrupted", "True"]


def test_without_an_interrupt_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    with repeat_keyboard_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is before

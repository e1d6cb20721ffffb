# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C inside PyTorch's tracer, which runs Python below C++ and drops some exceptions on the way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_SECONDS = 0.2


@contextmanager
def repeat_keyboard_interrupt() -> Iterator[None]:
    """Inside this context, Ctrl-C raises `KeyboardInterrupt` again and again until it arrives.

    It is raised on leaving at the latest. Outside the main thread, where Python handles no signals, nothing happens.
    """
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not default:
        yield
        return
    interrupted = False

    def raise_again(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, raise_again)
            signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, raise_again)
    try:
        yield
    finally:
        while interrupted and hasattr(signal, "setitimer"):
            try:  # first of all: what comes next must not be interrupted
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                break
            except KeyboardInterrupt:  # one more, which was under way on a busy machine
                continue
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt

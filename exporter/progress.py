# SPDX-License-Identifier: Apache-2.0
"""Telling the user which long step is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Step = Callable[[str], AbstractContextManager[object]]  # step("tracing") is a context that lasts as long as the step


def silent(name: str) -> AbstractContextManager[object]:
    """Shows nothing."""
    return nullcontext(name)


def on_terminal() -> Step:
    """Shows each step on standard error: a spinner while it runs (on a terminal), then its name and seconds."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.monotonic()
        with console.status(name):
            yield
        console.print(f"{name:<12}[dim]{time.monotonic() - start:6.1f} s[/dim]", soft_wrap=True)

    return step

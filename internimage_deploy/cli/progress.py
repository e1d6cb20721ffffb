# SPDX-License-Identifier: Apache-2.0
"""The progress bar of commands that work through images."""

from __future__ import annotations

import os
from typing import Any


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; `with` gives the function that advances it by one image.

    Args:
        what: what is done, in a word.
        total: number of images.
        quiet: show nothing.
    """

    def __init__(self, what: str, total: int, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet or not total or not os.isatty(2),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

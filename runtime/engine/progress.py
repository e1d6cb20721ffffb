# SPDX-License-Identifier: Apache-2.0
"""A build's progress on the terminal: a live tree of the running phases with the time each has taken."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from internimage_deploy.runtime.engine.protocol import (
    BuildEvent,
    CompilerChosen,
    PhaseFinished,
    PhaseStarted,
    StepCompleted,
)

if TYPE_CHECKING:
    from rich.live import Live
    from rich.tree import Tree


@dataclass
class Phase:
    """A running phase."""

    name: str
    steps: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    children: list[Phase] = field(default_factory=list)


class BuildTree:
    """Shows the events of a build (see `protocol`): a live tree on a terminal, nothing elsewhere.

    Phases whose parent has ended are dropped with it: compilers do not always report their end.
    """

    def __init__(self, title: str) -> None:
        self.root = Phase(title, 0)
        self._live: Live | None = None

    def __enter__(self) -> BuildTree:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(get_renderable=self.render, console=Console(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the tree was made."""
        return time.monotonic() - self.root.started

    def show(self, event: BuildEvent) -> None:
        """Update the tree with an event."""
        if isinstance(event, CompilerChosen):
            self.root.name = f"{event.name}: {self.root.name}"
        elif isinstance(event, PhaseStarted):
            parent = self._find(event.parent or "") or self.root
            parent.children.append(Phase(event.name, event.steps))
        elif isinstance(event, StepCompleted):
            if phase := self._find(event.name):
                phase.done = max(phase.done, event.step + 1)
        elif isinstance(event, PhaseFinished):
            self._remove(self.root, event.name)

    def render(self) -> Tree:
        """The current tree, for rich."""
        from rich.text import Text
        from rich.tree import Tree

        tree = Tree(Text(f"{self.root.name}  {self.elapsed_s:.0f} s", style="bold"))
        self._add_children(tree, self.root)
        return tree

    def _add_children(self, tree: Tree, phase: Phase) -> None:
        for child in phase.children:
            steps = f"{child.done}/{child.steps}  " if child.steps > 1 else ""
            branch = tree.add(f"{child.name}  {steps}{time.monotonic() - child.started:.0f} s")
            self._add_children(branch, child)

    def _find(self, name: str, phase: Phase | None = None) -> Phase | None:
        """The innermost running phase of that name, the latest where there are several."""
        for child in reversed((phase or self.root).children):
            found = self._find(name, child)
            if found is not None:
                return found
            if child.name == name:
                return child
        return None

    def _remove(self, phase: Phase, name: str) -> bool:
        for child in reversed(phase.children):
            if self._remove(child, name):
                return True
            if child.name == name:
                phase.children.remove(child)
                return True
        return False

# SPDX-License-Identifier: Apache-2.0
"""The files of an engine while it is made: the plan, its card, and the plugin library beside them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from internimage_deploy.card import ModelCard
from internimage_deploy.runtime.engine import sidecar


class Engine:
    """An engine's files in a folder of their own.

    Attributes:
        path: the engine file.
        card: its card, which is written beside it.
        graph: the ONNX file that was compiled, and the path beside which its weights lie.
        size_bytes: size of the engine file.
    """

    def __init__(self, path: Path, card: ModelCard, graph: tuple[Path, Path], size_bytes: int) -> None:
        self.path, self.card, self.graph, self.size_bytes = path, card, graph, size_bytes
        self._write_card()

    @property
    def form(self) -> str:
        """Form of the fusion convolutions, as the card has it."""
        assert self.card.engine is not None
        return self.card.engine.fusion

    def record(self, times: Mapping[str, float]) -> None:
        """Put the times of both forms of the fusion convolutions, in milliseconds, into the card."""
        assert self.card.engine is not None
        info = dataclasses.replace(self.card.engine, fusion_ms={form: round(ms, 4) for form, ms in times.items()})
        self.card = dataclasses.replace(self.card, engine=info)
        self._write_card()

    def move_to(self, stage: Path) -> None:
        """Move the files into `stage`, and remove the folders of this and of every other engine there."""
        folders = [entry for entry in stage.iterdir() if entry.is_dir()]
        for file in self.path.parent.iterdir():
            if file.is_file():
                file.rename(stage / file.name)
        for folder in folders:
            shutil.rmtree(folder)

    def _write_card(self) -> None:
        sidecar.path_of(self.path).write_text(self.card.to_json() + "\n")

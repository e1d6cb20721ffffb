# SPDX-License-Identifier: Apache-2.0
"""The counts of all images so far, from this run and an earlier one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.evaluation.counting import Counter, OnLabels
from internimage_deploy.runtime.evaluation.result import Evaluation
from internimage_deploy.runtime.evaluation.state import CountsFile
from internimage_deploy.runtime.evaluation.task import Task
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.pipelines.files import Outcome, Writer, segment_files
from internimage_deploy.runtime.pipelines.find import ImageFile
from internimage_deploy.runtime.pipelines.storage import Location
from internimage_deploy.runtime.segmenter import Segmenter

Elsewhere = Callable[[Sequence[ImageFile], Callable[[], Writer], Callable[[str, Outcome], None]], None]
"""Runs a model on images on other machines, each with what the second argument makes, and calls the third for each."""


@dataclass
class Tally:
    """The counts of each pair of classes, and what failed.

    Attributes:
        task: what is evaluated.
        file: takes the counts of each image; its own are counted at once.
        counted: stems of the images that are counted.
        failed: (image, reason) of those that could not be.
        agreeing: pixels to which both models assign the same class.
    """

    task: Task
    file: CountsFile | None
    counted: set[str] = field(default_factory=set)
    failed: list[tuple[str, str]] = field(default_factory=list)
    agreeing: int = 0

    def __post_init__(self) -> None:
        truth = self.task.pairs.truth
        self._counts = [
            np.zeros((truth.classes + 1, len(model_card(path).classes)), np.int64) for path in self.task.models
        ]
        self._seconds = [0.0 for _ in self.task.models]
        self._timed = 0
        known = {image.stem for image in self.task.pairs.images}
        for stem, record in ({} if self.file is None else self.file.records).items():
            if stem in known:
                self._add(stem, record)

    def count(self, images: Sequence[ImageFile], segmenters: Sequence[Segmenter], done: Callable[[], None]) -> None:
        """Run each model on `images`, and count those that all of them could take."""
        truth = self.task.pairs.truth
        labels: dict[str, Labels] = {}
        same: dict[str, int] = {}

        def keep(image: ImageFile, found: Labels) -> None:
            labels[image.stem] = found

        def compare(image: ImageFile, found: Labels) -> None:
            same[image.stem] = int(np.count_nonzero(labels[image.stem] == found))

        watchers: list[OnLabels | None] = [None] if len(segmenters) == 1 else [keep, compare]
        outcomes: list[dict[str, Outcome]] = []
        remaining = list(images)
        for index, (segmenter, watcher) in enumerate(zip(segmenters, watchers, strict=True)):
            last = index == len(segmenters) - 1
            outcomes.append({})

            def settle(image: ImageFile, outcome: Outcome, last: bool = last) -> None:
                if outcome.error:
                    self.failed.append((str(image), outcome.error))
                else:
                    outcomes[-1][image.stem] = outcome
                    if last:
                        self._settle(image.stem, [each[image.stem] for each in outcomes], same.get(image.stem))
                        outcomes[-1][image.stem] = Outcome()  # the counts of thousands of images take memory
                if last or outcome.error:
                    done()

            started = time.monotonic()
            segment_files(segmenter, remaining, Counter(truth, watcher), settle)
            self._seconds[index] += time.monotonic() - started
            remaining = [image for image in remaining if image.stem in outcomes[-1]]
        self._timed += len(remaining)

    def count_elsewhere(self, images: Sequence[ImageFile], elsewhere: Elsewhere, done: Callable[[], None]) -> None:
        """Run the model on `images` on a cluster, and count them."""
        truth = self.task.pairs.truth
        if not truth.folder.is_address:
            truth = dataclasses.replace(truth, folder=Location(str(Path(truth.folder.uri).absolute())))
        by_name = {str(image.absolute()): image for image in images}

        def settle(name: str, outcome: Outcome) -> None:
            if outcome.error:
                self.failed.append((str(by_name[name]), outcome.error))
            else:
                self._settle(by_name[name].stem, [outcome], None)
                self._timed += 1
            done()

        started = time.monotonic()
        elsewhere([image.absolute() for image in images], partial(Counter, truth), settle)
        self._seconds[0] += time.monotonic() - started

    def result(self) -> Evaluation:
        """Raises `UserError` where no image was counted."""
        if not self.counted:
            source, reason = self.failed[0]
            named = reason if source in reason else f"{source}: {reason}"
            raise UserError(named if len(self.failed) == 1 else f"none of {len(self.failed)} images; first {named}")
        results = [
            Evaluation(
                model=path.name,
                dataset=self.task.pairs.layout.name,
                classes=self.task.classes,
                confusion=counts[:-1],
                ignored=int(counts[-1].sum()),
                images=len(self.counted),
                failed=tuple(self.failed),
                seconds=seconds,
                timed_images=self._timed,
            )
            for path, counts, seconds in zip(self.task.models, self._counts, self._seconds, strict=True)
        ]
        if len(results) == 1:
            return results[0]
        agreement = self.agreeing / int(self._counts[0].sum())
        return dataclasses.replace(results[0], against=results[1], agreement=agreement)

    def _settle(self, stem: str, outcomes: Sequence[Outcome], same: int | None) -> None:
        record: dict[str, Any] = {"image": stem, "counts": [list(outcome.counts) for outcome in outcomes]}
        if same is not None:
            record["same"] = same
        if self.file is not None:
            self.file.add(record)
        self._add(stem, record)

    def _add(self, stem: str, record: dict[str, Any]) -> None:
        try:
            for counts, entries in zip(self._counts, record["counts"], strict=True):
                for true, found, pixels in entries:
                    counts[true, found] += pixels
            self.agreeing += record.get("same", 0)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise UserError(f"the counts of {stem} are damaged; leave --resume out to start over") from error
        self.counted.add(stem)

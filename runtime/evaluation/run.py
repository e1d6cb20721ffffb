# SPDX-License-Identifier: Apache-2.0
"""Evaluating a model on labelled images, alone or beside a second one."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internimage_deploy.datasets.classes import lookup
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write, sha256
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.backends.registry import choose, reads
from internimage_deploy.runtime.evaluation.counting import Counter, OnLabels
from internimage_deploy.runtime.evaluation.result import Evaluation
from internimage_deploy.runtime.evaluation.state import CountsFile
from internimage_deploy.runtime.evaluation.truth import Pairs, differing_names, find_pairs
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.imaging.label_map import check_label_map
from internimage_deploy.runtime.imaging.pipeline import Resize, WindowChoice
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.pipelines.files import Outcome, Writer, segment_files
from internimage_deploy.runtime.pipelines.find import ImageFile
from internimage_deploy.runtime.pipelines.storage import Location
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.runtime.verification import check_comparable
from internimage_deploy.window import Window

COUNTS_ENDING = ".images.jsonl"
"""Ending of the file of counts beside a JSON result."""
_PART = 16  # images that two models take in turns: their labels are in memory in between
# Layouts whose table of classes has another name.
_CLASS_TABLES = {"mapillary-19": "cityscapes", "coco-stuff-10k": "coco-stuff", "pascal-context": "pascal-context-59"}


Elsewhere = Callable[[Sequence[ImageFile], Callable[[], Writer], Callable[[str, Outcome], None]], None]
"""Runs a model on images on other machines, each with what the second argument makes, and calls the third for each."""


@dataclass(frozen=True)
class Task:
    """What is evaluated.

    Attributes:
        model: the model file.
        options: how it is loaded.
        pairs: images and label maps.
        classes: names of the classes that count.
        against: a second model file, or None.
        json: where the result goes as JSON, and beside it the counts of each image; None for nowhere.
        resume: go on with the counts of an earlier run.
    """

    model: Path
    options: LoadOptions
    pairs: Pairs
    classes: tuple[str, ...]
    against: Path | None = None
    json: Path | None = None
    resume: bool = False

    @property
    def models(self) -> list[Path]:
        """The model, and the second one if there is one."""
        return [self.model] if self.against is None else [self.model, self.against]


def plan(
    model: Path,
    images: str,
    labels: str,
    options: LoadOptions,
    *,
    dataset: str | None = None,
    split: Path | None = None,
    against: Path | None = None,
    ignore_unknown: bool = False,
    skip_unlabeled: bool = False,
    json: Path | None = None,
    resume: bool = False,
) -> Task:
    """Find what there is to evaluate, and what is wrong with it before anything runs; arguments as in `evaluate`.

    Raises:
        UserError: a file or folder is missing or unfit.
    """
    card = model_card(model)
    choose(model, options.backend)
    if against is not None:
        other = model_card(against)
        choose(against, _second_backend(options, against))
        check_comparable(card, other)
    if resume and json is None:
        raise UserError("--resume goes on with the counts beside the JSON result; name that with --json")
    pairs = find_pairs(
        images,
        labels,
        len(card.classes),
        dataset=dataset,
        split=split,
        ignore_unknown=ignore_unknown,
        skip_unlabeled=skip_unlabeled,
    )
    # What is wrong with one label map is often wrong with all: the first is looked at before a network runs.
    storage, path = pairs.truth.folder.open(), pairs.truth.paths[pairs.images[0].stem]
    check_label_map(storage.read(path), f"{pairs.truth.folder}/{path}")
    table = lookup(_CLASS_TABLES.get(pairs.layout.name, pairs.layout.name))
    if table is not None and (note := differing_names(card.classes, table[0])):
        pairs.notes.append(note)
    return Task(model, options, pairs, card.classes[: pairs.truth.classes], against, json, resume)


def run(task: Task, done: Callable[[], None] = lambda: None, elsewhere: Elsewhere | None = None) -> Evaluation:
    """Evaluate on this machine, or on a cluster.

    Args:
        task: from `plan`; on a cluster, of one model.
        done: called once per image, for progress.
        elsewhere: runs the model on a cluster.

    Raises:
        UserError: a model cannot be loaded, or a file cannot be written. Images that fail are in the result.
    """
    with ExitStack() as stack:
        counts = _counts_file(task, stack)
        tally = _Tally(task, counts)
        waiting = [image for image in task.pairs.images if image.stem not in tally.counted]
        for _ in tally.counted:
            done()
        if waiting and elsewhere is not None:
            tally.count_elsewhere(waiting, elsewhere, done)
        elif waiting:
            segmenters = [
                stack.enter_context(Segmenter.from_options(path, options))
                for path, options in zip(task.models, _options(task), strict=True)
            ]
            for part in _parts(waiting, segmenters):
                tally.count(part, segmenters, done)
        result = tally.result()
    if task.json is not None:
        _write_json(task.json, result)
    return result


def evaluate(
    model: str | os.PathLike[str],
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    ignore_unknown: bool = False,
    skip_unlabeled: bool = False,
    json: str | os.PathLike[str] | None = None,
    resume: bool = False,
    backend: str = "auto",
    threads: int | None = None,
    resize: Resize = None,
    window: WindowChoice = None,
    batch: int = 1,
    max_pixels: int = MAX_PIXELS,
    trust_engine: bool = False,
    cuda_graphs: bool = True,
    device: int = 0,
    scales: Sequence[float] = (),
    flip: bool = False,
) -> Evaluation:
    """Score a model file against label maps, with the metrics of mmsegmentation.

    Args:
        model: an ONNX file or an engine.
        images: folder of the images, or an object store's prefix; searched to any depth.
        labels: folder of the label maps: grey or palette images of the same size as the images.
        dataset: a name of `internimage_deploy.datasets.layouts.LAYOUTS`; None to recognise it.
        split: a text file with an image's stem in each line; None for the data set's own, or all images.
        against: a second model file, run on the same images.
        ignore_unknown: count values that mean no class as ignored, instead of failing the image.
        skip_unlabeled: leave out images without a label map, instead of failing.
        json: write the result to this file, and the counts of each image beside it.
        resume: leave out images that these counts hold already.
        backend: that runs the model; "auto" to choose one.
        threads: CPU threads of the network; None for all.
        resize: see `LoadOptions`.
        window: see `LoadOptions`.
        batch: maximum number of images (or crops) in one run of the network.
        max_pixels: image files with more pixels are refused.
        trust_engine: see `LoadOptions`.
        cuda_graphs: see `LoadOptions`.
        device: number of the GPU.
        scales: test-time augmentation, see `LoadOptions`.
        flip: test-time augmentation, see `LoadOptions`.

    Raises:
        UserError: a file or folder is missing or unfit, or no image could be evaluated. Images that fail beside others
            are in `Evaluation.failed`.
    """
    options = LoadOptions(
        backend, threads, resize, window, batch, max_pixels, trust_engine, cuda_graphs, device, tuple(scales), flip
    )
    task = plan(
        Path(model),
        os.fspath(images),
        os.fspath(labels),
        options,
        dataset=dataset,
        split=None if split is None else Path(split),
        against=None if against is None else Path(against),
        ignore_unknown=ignore_unknown,
        skip_unlabeled=skip_unlabeled,
        json=None if json is None else Path(json),
        resume=resume,
    )
    return run(task)


@dataclass
class _Tally:
    """The counts of all images so far."""

    task: Task
    file: CountsFile | None
    counted: set[str] = field(default_factory=set)
    failed: list[tuple[str, str]] = field(default_factory=list)
    agreeing: int = 0  # pixels

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


def _counts_file(task: Task, stack: ExitStack) -> CountsFile | None:
    """The file of counts beside the JSON result, opened; None where there is no such result."""
    if task.json is None:
        return None
    path = task.json.with_suffix(COUNTS_ENDING)
    return stack.enter_context(CountsFile(path, _subject(task), resume=task.resume))


def _subject(task: Task) -> dict[str, Any]:
    """What the counts depend on, as plain data; files of images and label maps are taken for what they were."""
    truth, options = task.pairs.truth, task.options
    window = dataclasses.asdict(options.window) if isinstance(options.window, Window) else options.window
    return {
        "models": [sha256(path) for path in task.models],
        "backend": options.backend,
        "resize": options.resize,
        "window": window,
        "scales": options.scales,
        "flip": options.flip,
        "dataset": task.pairs.layout.name,
        "labels": truth.meaning,
        "classes": truth.classes,
        "ignore_unknown": truth.ignore_unknown,
    }


def _options(task: Task) -> list[LoadOptions]:
    """How each model is loaded."""
    if task.against is None:
        return [task.options]
    return [task.options, dataclasses.replace(task.options, backend=_second_backend(task.options, task.against))]


def _second_backend(options: LoadOptions, against: Path) -> str:
    """The backend of the first model where it reads the second one's file, else what that file is for."""
    return options.backend if reads(options.backend, against) else "auto"


def _parts(images: Sequence[ImageFile], segmenters: Sequence[Segmenter]) -> Iterator[Sequence[ImageFile]]:
    """`images` as one model takes them, all at once, or as two take turns."""
    step = len(images) if len(segmenters) == 1 else max(_PART, *(2 * segmenter.batch for segmenter in segmenters))
    for start in range(0, len(images), step):
        yield images[start : start + step]


def _write_json(path: Path, result: Evaluation) -> None:
    """A line for each field: the confusion matrix has one number for each pair of classes."""
    lines = [f" {jsonlib.dumps(name)}: {jsonlib.dumps(value)}" for name, value in result.to_json().items()]
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")

# SPDX-License-Identifier: Apache-2.0
"""Evaluating a model on labelled images, alone or beside a second one."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from internimage_deploy.files import atomic_write, sha256
from internimage_deploy.runtime.evaluation.result import Evaluation
from internimage_deploy.runtime.evaluation.state import CountsFile
from internimage_deploy.runtime.evaluation.tally import Elsewhere, Tally
from internimage_deploy.runtime.evaluation.task import Task, plan
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.imaging.pipeline import Resize, WindowChoice
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.pipelines.find import ImageFile
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.window import Window

COUNTS_ENDING = ".images.jsonl"
"""Ending of the file of counts beside a JSON result."""
_PART = 16  # images that two models take in turns: their labels are in memory in between


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
        tally = Tally(task, counts)
        waiting = [image for image in task.pairs.images if image.stem not in tally.counted]
        for _ in tally.counted:
            done()
        if waiting and elsewhere is not None:
            tally.count_elsewhere(waiting, elsewhere, done)
        elif waiting:
            segmenters = [
                stack.enter_context(Segmenter.from_options(path, options))
                for path, options in zip(task.models, task.load_options, strict=True)
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


def _parts(images: Sequence[ImageFile], segmenters: Sequence[Segmenter]) -> Iterator[Sequence[ImageFile]]:
    """`images` as one model takes them, all at once, or as two take turns."""
    step = len(images) if len(segmenters) == 1 else max(_PART, *(2 * segmenter.batch for segmenter in segmenters))
    for start in range(0, len(images), step):
        yield images[start : start + step]


def _write_json(path: Path, result: Evaluation) -> None:
    """A line for each field: the confusion matrix has one number for each pair of classes."""
    lines = [f" {jsonlib.dumps(name)}: {jsonlib.dumps(value)}" for name, value in result.to_json().items()]
    atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")

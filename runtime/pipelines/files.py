# SPDX-License-Identifier: Apache-2.0
"""Many picture files through one model: decoded ahead of the network, written behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import find_images
from internimage_deploy.runtime.imaging.pipeline import PreparedImage
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.segmenter import Group, Segmenter

_DECODERS = 2
_WRITERS = 2


@dataclass(frozen=True)
class Job:
    """A picture file and the path, relative to the output folder and without suffix, of its results."""

    source: Path
    stem: Path


_Group = Group[Job, PreparedImage]


class WriteFailure(Exception):
    """A result could not be written; wraps the `UserError` that says why. Ends the run: the next would fail too."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def plan(inputs: Sequence[Path], *, recursive: bool = False) -> list[Job]:
    """The jobs for `inputs`: picture files, and folders to be searched. A file that is named twice is done once.

    Raises:
        UserError: a folder without pictures, or two pictures whose results would have the same name.
    """
    jobs: dict[Path, Job] = {}
    for given in inputs:
        for source in find_images(given, recursive=recursive) if given.is_dir() else [given]:
            inside = source.relative_to(given).parent if given.is_dir() else Path()
            jobs.setdefault(source.resolve(), Job(source, inside / source.stem))
    owners: dict[Path, Job] = {}
    for job in jobs.values():
        first = owners.setdefault(job.stem, job)
        if first is not job:
            raise UserError(
                f"{first.source} and {job.source} would both write {job.stem}.labels.png; "
                "rename one, or segment them into different folders"
            )
    return list(jobs.values())


def run(
    segmenter: Segmenter,
    jobs: Sequence[Job],
    write: Callable[[Job, Segmentation], None],
    done: Callable[[Job, UserError | None], None],
) -> None:
    """Segment `jobs` in order and hand each result to `write`, in a thread of its own.

    `done` is called from this thread once per job, with the error of a picture that could not be read or segmented;
    the others go on. An exception from `write` ends the run. However it ends, no thread is left at work.

    Raises:
        WriteFailure: `write` raised a `UserError`.
    """
    decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
    writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="write")
    writing: deque[tuple[Job, Future[None]]] = deque()

    def settle(most: int) -> None:
        while len(writing) > most:
            job, future = writing.popleft()
            _report(job, future, done)

    def finish_and_write(job: Job, prepared: PreparedImage, output: npt.NDArray[Any]) -> None:
        result = segmenter.finish(prepared, output)
        try:
            write(job, result)
        except UserError as error:
            raise WriteFailure(error) from error

    def failed(group: _Group, error: UserError) -> None:
        for job, _ in group:
            done(job, error)

    try:
        groups = _groups(_decoded(segmenter, jobs, decoders, done), segmenter.batch)
        for group, outputs in segmenter.forward_each(groups, failed):
            for (job, prepared), output in zip(group, outputs, strict=True):
                writing.append((job, writers.submit(finish_and_write, job, prepared, output)))
            settle(2 * max(segmenter.batch, _WRITERS))
        settle(0)
    finally:
        for pool in (decoders, writers):
            pool.shutdown(wait=True, cancel_futures=True)


def _report(job: Job, future: Future[None], done: Callable[[Job, UserError | None], None]) -> None:
    try:
        future.result()
    except UserError as error:
        done(job, error)
    else:
        done(job, None)


def _decoded(
    segmenter: Segmenter, jobs: Sequence[Job], pool: ThreadPoolExecutor, done: Callable[[Job, UserError | None], None]
) -> Iterator[tuple[Job, PreparedImage]]:
    """Jobs with their prepared pictures, in order; a bounded number is decoded ahead, so memory stays flat."""
    ahead: deque[tuple[Job, Future[PreparedImage]]] = deque()
    waiting = iter(jobs)
    while True:
        while len(ahead) < 2 * max(segmenter.batch, _DECODERS) and (job := next(waiting, None)) is not None:
            ahead.append((job, pool.submit(segmenter.prepare, job.source)))
        if not ahead:
            return
        job, future = ahead.popleft()
        try:
            prepared = future.result()
        except UserError as error:
            done(job, error)
        else:
            yield job, prepared


def _groups(items: Iterator[tuple[Job, PreparedImage]], batch: int) -> Iterator[_Group]:
    """Consecutive pictures of one network size, up to `batch` together."""
    group: list[tuple[Job, PreparedImage]] = []
    for item in items:
        if group and (len(group) == batch or item[1].size != group[0][1].size):
            yield group
            group = []
        group.append(item)
    if group:
        yield group

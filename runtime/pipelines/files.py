# SPDX-License-Identifier: Apache-2.0
"""Many image files through one model: decoded ahead of the network, written behind it."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.fetch import MAX_BYTES
from internimage_deploy.runtime.imaging.image_io import decode_image
from internimage_deploy.runtime.imaging.pipeline import PreparedImage, images_per_run
from internimage_deploy.runtime.imaging.results import FAILURES, ResultOptions
from internimage_deploy.runtime.pipelines.find import STDIN, ImageFile
from internimage_deploy.runtime.pipelines.storage import Location, Storage
from internimage_deploy.runtime.segmenter import Group, Segmenter

_DECODERS = 2
_WRITERS = 2

_Group = Group[ImageFile, PreparedImage]


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        error: why it failed; empty where it did not.
        pixels: by class name.
        counts: (true class, predicted class, pixels) of an image that is scored; the number of classes for a pixel that
            is ignored.
        fatal: its results could not be written, which ends the run: those of others could not be written either.
    """

    error: str = ""
    pixels: dict[str, int] = field(default_factory=dict)
    counts: Sequence[tuple[int, int, int]] = ()
    fatal: bool = False


@dataclass
class Report:
    """How a run went.

    Attributes:
        done: images that were segmented.
        skipped: images whose results existed already.
        failed: (image or video, reason) of those that could not be read or segmented.
        pixels: of all images together, by class name.
    """

    done: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    pixels: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, outcome: Outcome) -> None:
        """Count one image."""
        if outcome.error:
            self.failed.append((source, outcome.error))
        else:
            self.done += 1
            self.pixels.update(outcome.pixels)


class WriteFailure(Exception):
    """A result could not be written; wraps the `UserError` that says why. Ends the run: the next would fail too."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Writer(Protocol):
    """What becomes of the network's output for an image."""

    def write(
        self, image: ImageFile, segmenter: Segmenter, prepared: PreparedImage, output: npt.NDArray[Any]
    ) -> Outcome:
        """Finish one image; called from several threads. Raises `UserError` or `WriteFailure`."""


class ResultWriter:
    """Writes the results of images into an output folder or prefix, which is opened once.

    Args:
        output: where results go.
        options: which files are written beside the label maps.
        model: the model's name for the JSON files.
    """

    def __init__(self, output: Location, options: ResultOptions, model: str) -> None:
        self.storage: Storage = output.open()
        self._options = options
        self._model = model

    def without_finished(self, images: Sequence[ImageFile]) -> list[ImageFile]:
        """Those of `images` for which one of the files that the options ask for does not exist yet."""
        paths = set(self.storage.list(recursive=True))
        endings = self._options.endings
        return [image for image in images if not all(image.stem + ending in paths for ending in endings)]

    def write(
        self, image: ImageFile, segmenter: Segmenter, prepared: PreparedImage, output: npt.NDArray[Any]
    ) -> Outcome:
        """Finish and write one image, its label map last. Raises `UserError` or `WriteFailure`."""
        result = segmenter.finish(prepared, output)
        files = result.encode(self._options, {"image": image.name, "model": self._model})
        try:
            for ending, data in files.items():
                self.storage.write(image.stem + ending, data)
        except UserError as error:
            raise WriteFailure(error) from error
        pixels: Counter[str] = Counter()
        for index, count in result.pixels().items():
            pixels[result.classes[index]] += count
        return Outcome(pixels=dict(pixels))

    def write_failures(self, report: Report) -> None:
        """List the failures of a run beside its results; an older list goes away when there are none."""
        if report.failed:
            lines = [json.dumps({"source": source, "error": error}) + "\n" for source, error in report.failed]
            self.storage.write(FAILURES, "".join(lines).encode())
        elif FAILURES in self.storage.list(recursive=False):
            self.storage.delete(FAILURES)


class ImageReader:
    """Reads images, each location opened once."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._opened: dict[Location, Storage] = {}
        self._lock = threading.Lock()

    def read(self, image: ImageFile) -> PreparedImage:
        """`image` decoded and resized; may be called from any thread. Raises `UserError`."""
        if not image.location.uri:
            return (
                self._decoded(_standard_input(), image) if image.path == STDIN else self._segmenter.prepare(image.path)
            )
        if not image.location.is_address:
            return self._segmenter.prepare(Path(str(image)))
        with self._lock:
            if image.location not in self._opened:
                self._opened[image.location] = image.location.open()
            storage = self._opened[image.location]
        return self._decoded(storage.read(image.path), image)

    def _decoded(self, data: bytes, image: ImageFile) -> PreparedImage:
        limit = self._segmenter.pipeline.max_pixels
        return self._segmenter.prepare(decode_image(data, what=str(image), max_pixels=limit))


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"standard input: larger than {MAX_BYTES >> 20} MiB; name the file instead")
    if not data:
        raise UserError("standard input: nothing came, expected an image file")
    return data


def segment_files(
    segmenter: Segmenter,
    images: Sequence[ImageFile],
    writer: Writer,
    done: Callable[[ImageFile, Outcome], None],
) -> None:
    """Segment `images` in order; `writer` works in threads of its own.

    Args:
        segmenter: the model.
        images: what to segment.
        writer: takes the network's outputs.
        done: called from this thread once per image; one that could not be read or segmented leaves the others alone.

    However it ends, no thread is left at work.

    Raises:
        WriteFailure: a result could not be written.
    """
    reader = ImageReader(segmenter)
    decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
    writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="write")
    writing: deque[tuple[ImageFile, Future[Outcome]]] = deque()

    def settle(most: int) -> None:
        while len(writing) > most:
            image, future = writing.popleft()
            try:
                outcome = future.result()
            except UserError as error:
                outcome = Outcome(str(error))
            done(image, outcome)

    def failed(group: _Group, error: UserError) -> None:
        for image, _ in group:
            done(image, Outcome(str(error)))

    try:
        groups = _groups(_decoded(reader, images, segmenter.batch, decoders, done), segmenter.batch)
        for group, outputs in segmenter.forward_each(groups, failed):
            for (image, prepared), output in zip(group, outputs, strict=True):
                writing.append((image, writers.submit(writer.write, image, segmenter, prepared, output)))
            settle(2 * max(segmenter.batch, _WRITERS))
        settle(0)
    finally:
        for pool in (decoders, writers):
            pool.shutdown(wait=True, cancel_futures=True)


def _decoded(
    reader: ImageReader,
    images: Sequence[ImageFile],
    batch: int,
    pool: ThreadPoolExecutor,
    done: Callable[[ImageFile, Outcome], None],
) -> Iterator[tuple[ImageFile, PreparedImage]]:
    """Images ready for the network, in order; a bounded number is decoded ahead, so memory stays flat."""
    ahead: deque[tuple[ImageFile, Future[PreparedImage]]] = deque()
    waiting = iter(images)
    while True:
        while len(ahead) < 2 * max(batch, _DECODERS) and (image := next(waiting, None)) is not None:
            ahead.append((image, pool.submit(reader.read, image)))
        if not ahead:
            return
        image, future = ahead.popleft()
        try:
            prepared = future.result()
        except UserError as error:
            done(image, Outcome(str(error)))
        else:
            yield image, prepared


def _groups(items: Iterator[tuple[ImageFile, PreparedImage]], batch: int) -> Iterator[_Group]:
    """Consecutive images of one network size, as many as fill a run of the network."""
    group: list[tuple[ImageFile, PreparedImage]] = []
    for item in items:
        if group and (len(group) == images_per_run(item[1], batch) or item[1].size != group[0][1].size):
            yield group
            group = []
        group.append(item)
    if group:
        yield group

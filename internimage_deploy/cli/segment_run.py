# SPDX-License-Identifier: Apache-2.0
"""One run of `segment`: finds what there is to do, does it here or on a cluster, and tells how it went."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from internimage_deploy.cli.progress import ProgressBar
from internimage_deploy.errors import UserError, escaped
from internimage_deploy.files import check_folder, make_folder
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.cluster.connect import Cluster
from internimage_deploy.runtime.imaging.results import FRAMES_JSON, OVERLAY_VIDEO, ResultOptions
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.pipelines.files import Outcome, Report, ResultWriter, WriteFailure
from internimage_deploy.runtime.pipelines.find import ImageFile, Inputs, VideoFile
from internimage_deploy.runtime.pipelines.storage import Location
from internimage_deploy.runtime.pipelines.video_results import VideoResults

_LARGEST = 5  # classes in the summary


@dataclass(frozen=True)
class VideoOptions:
    """How videos are read, and whether the label map of each frame is written."""

    live: bool = False
    frames: int | None = None
    frame_masks: bool = False


class Run:
    """What is to be done, and how it went.

    Args:
        model: the model file.
        options: how it is loaded.
        inputs: images and videos.
        output: where results go.
        results: which files are written.
        classes: names of the classes that overlays and JSON files show; none for all.
        skip_existing: leave out images whose results all exist already.
        quiet: say nothing but what failed.

    Raises:
        UserError: no such model, class or output.
    """

    def __init__(
        self,
        model: Path,
        options: LoadOptions,
        inputs: Inputs,
        output: Location,
        results: ResultOptions,
        classes: tuple[str, ...],
        *,
        skip_existing: bool,
        quiet: bool,
    ) -> None:
        self.model, self.options, self.output, self.quiet = model, options, output, quiet
        self.results = replace(results, classes=_class_ids(classes, model) if classes else None)
        self.videos = inputs.videos
        self.missing = inputs.missing
        self.writer = ResultWriter(output, self.results, model.name)
        self.images = self.writer.without_finished(inputs.images) if skip_existing else inputs.images
        self.report = Report(skipped=len(inputs.images) - len(self.images), failed=list(inputs.missing))
        self.seconds = 0.0
        if not output.is_address:
            check_folder(Path(output.uri))
        elif self.videos:
            raise UserError(f"{output}: the results of videos are written to folders only; name a folder for --output")
        self._note(inputs)

    def here(self, video: VideoOptions) -> None:
        """Segment on this machine, videos first."""
        from internimage_deploy.runtime.pipelines.files import segment_files
        from internimage_deploy.runtime.segmenter import Segmenter

        if not self.videos and not self.images:
            return
        with Segmenter.from_options(self.model, self.options) as segmenter:
            if not self.output.is_address:
                make_folder(Path(self.output.uri))
            for source in self.videos:
                try:
                    self._video(segmenter, source, video)
                except UserError as error:
                    self.report.failed.append((str(source), str(error)))
            started = time.monotonic()
            with ProgressBar("segmenting", len(self.images), quiet=self.quiet) as advance:

                def done(image: ImageFile, outcome: Outcome) -> None:
                    self.report.add(str(image), outcome)
                    advance()

                try:
                    segment_files(segmenter, self.images, self.writer, done)
                except WriteFailure as failure:
                    raise failure.reason from failure
            self.seconds = time.monotonic() - started

    def on_cluster(self, cluster: Cluster) -> None:
        """Segment on a Ray cluster."""
        from internimage_deploy.runtime.cluster.batch import segment_on_cluster

        if not self.images:
            return
        started = time.monotonic()
        with ProgressBar("segmenting", len(self.images), quiet=self.quiet) as advance:

            def done(image: str, outcome: Outcome) -> None:
                self.report.add(image, outcome)
                advance()

            output = self.output if self.output.is_address else Location(str(Path(self.output.uri).absolute()))
            images = [image.absolute() for image in self.images]
            writer = partial(ResultWriter, output, self.results, self.model.name)
            segment_on_cluster(self.model.absolute(), self.options, images, writer, done, cluster=cluster)
        self.seconds = time.monotonic() - started

    def finish(self) -> None:
        """Say how it went. Raises `UserError` if anything failed."""
        report = self.report
        self.writer.write_failures(report)
        total = len(self.videos) + len(self.images) + len(self.missing)
        if total == len(report.failed) == 1:
            raise UserError(_named(*report.failed[0]))
        for failure in report.failed:
            click.echo(f"failed: {escaped(_named(*failure))}", err=True)
        if (self.images or report.skipped) and not self.quiet:
            self._summary()
        if report.failed:
            images, videos = bool(self.images or self.missing), bool(self.videos)
            kinds = " and ".join(kind for kind, there in (("images", images), ("videos", videos)) if there)
            raise UserError(f"{len(report.failed)} of {total} {kinds} could not be segmented; they are named above")

    def _summary(self) -> None:
        report, count = self.report, len(self.images) + len(self.missing)
        skipped = (
            f", {report.skipped} {'was' if report.skipped == 1 else 'were'} there already" if report.skipped else ""
        )
        noun = "image" if count == 1 else "images"
        click.echo(f"segmented {report.done} of {count} {noun} into {self.output}{skipped}")
        if not report.done:
            return
        click.echo(f"{self.seconds:.1f} s, {report.done / max(self.seconds, 1e-9):.1f} images per second")
        shown = self.results.classes
        names = None if shown is None else {model_card(self.model).classes[index] for index in shown}
        counted = [(name, count) for name, count in report.pixels.most_common() if names is None or name in names]
        largest = counted[:_LARGEST]
        if not largest:
            return
        width = max(len(name) for name, _ in largest)
        every = report.pixels.total()
        for name, pixels in largest:
            click.echo(f"  {name:{width}}  {pixels / every:6.1%}")
        if len(counted) > len(largest):
            click.echo(f"  and {len(counted) - len(largest)} more classes")

    def _note(self, inputs: Inputs) -> None:
        if inputs.unread:
            shown = ", ".join(inputs.unread[:3]) + (", ..." if len(inputs.unread) > 3 else "")
            click.echo(f"note: left out, for their format is not read: {escaped(shown)}", err=True)
        if inputs.renamed and not self.quiet:
            first = inputs.renamed[0]
            told = f"note: files share a name, so their results are told apart: {first} -> {first.stem}.labels.png"
            click.echo(escaped(told), err=True)

    def _video(self, segmenter: Any, video: VideoFile, options: VideoOptions) -> None:
        from internimage_deploy.runtime.pipelines.video import Progress, segment_video

        base = Path(self.output.uri) / video.stem
        results = VideoResults(
            overlay=base.with_name(base.name + OVERLAY_VIDEO) if self.results.overlay else None,
            frames_json=base.with_name(base.name + FRAMES_JSON) if self.results.as_json else None,
            frames_folder=base.with_name(base.name + ".frames") if options.frame_masks else None,
            options=self.results,
        )
        shown = sys.stderr.isatty() and not self.quiet

        def report(progress: Progress) -> None:
            if shown:
                click.echo(f"\r{_speed(progress)}   ", err=True, nl=False)

        progress = segment_video(
            segmenter, video.source, results, live=options.live, max_frames=options.frames, report=report
        )
        if shown:
            click.echo("\r", err=True, nl=False)
        if not self.quiet:
            click.echo(escaped(f"{video}: {_speed(progress)}, wrote {', '.join(map(str, results.paths))}"))


def _class_ids(names: tuple[str, ...], model: Path) -> tuple[int, ...]:
    """Ids of classes by name, or by number where no class has that name. Raises `UserError`."""
    classes = model_card(model).classes
    known: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        known.setdefault(name.lower(), []).append(index)
    ids: list[int] = []
    for name in names:
        if name.lower() in known:
            ids += known[name.lower()]
        elif name.isdecimal() and int(name) < len(classes):
            ids.append(int(name))
        else:
            near = ", ".join(list(known)[:8]) + (", ... (info --json lists all)" if len(known) > 8 else "")
            raise UserError(f"--classes: the model has no class '{name}'; it has {near}")
    return tuple(ids)


def _named(source: str, reason: str) -> str:
    return reason if source in reason else f"{source}: {reason}"


def _speed(progress: Any) -> str:
    dropped = f", {progress.dropped} dropped" if progress.dropped else ""
    return f"{progress.frames} frames, {progress.fps:.1f} per second{dropped}"

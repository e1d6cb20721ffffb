# SPDX-License-Identifier: Apache-2.0
"""`segment` for one video: an overlay video, or frames per second."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from internimage_deploy.runtime.pipelines.video import Progress, segment_video, stem
from internimage_deploy.runtime.segmenter import Segmenter


def segment_one_video(
    segmenter: Segmenter, source: str, folder: Path, *, overlay: bool, live: bool, most_frames: int | None
) -> None:
    """Segment `source`, with its overlay into `folder` if asked, and say how fast that went. Raises `UserError`."""
    target = folder / f"{stem(source)}.overlay.mp4" if overlay else None
    shown = sys.stderr.isatty()

    def report(progress: Progress) -> None:
        if shown:
            click.echo(f"\r{_text(progress)}   ", err=True, nl=False)

    done = segment_video(segmenter, source, target, live=live, most_frames=most_frames, report=report)
    if shown:
        click.echo("\r", err=True, nl=False)
    click.echo(f"{source}: {_text(done)}{f', wrote {target}' if target else ''}")


def _text(progress: Progress) -> str:
    dropped = f", {progress.dropped} dropped" if progress.dropped else ""
    return f"{progress.frames} frames, {progress.fps:.1f} per second{dropped}"

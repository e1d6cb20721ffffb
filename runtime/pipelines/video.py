# SPDX-License-Identifier: Apache-2.0
"""Video files, cameras and network streams through a model: read ahead, segmented, drawn and written behind."""

from __future__ import annotations

import queue
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.fetch import address_stem, is_web_address, without_credentials
from internimage_deploy.runtime.imaging.pipeline import PreparedImage
from internimage_deploy.runtime.pipelines.video_results import FrameSink, VideoResults
from internimage_deploy.runtime.segmenter import Segmenter

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv")
_PLAYLISTS = (".m3u8", ".mpd", ".mjpg", ".mjpeg")
_AHEAD = 4  # frames between two stages; more would only add delay
_DEFAULT_FPS = 25.0
_Item = Any  # what goes through a queue; None ends it


@dataclass(frozen=True)
class Progress:
    """Where a video stands."""

    frames: int  # segmented
    dropped: int  # left out to keep up with a live source
    seconds: float

    @property
    def fps(self) -> float:
        """Frames per second so far."""
        return self.frames / self.seconds if self.seconds else 0.0


def is_video(source: str, *, web: bool = False) -> bool:
    """True for a video file's name, a camera's number, a stream's address, or a GStreamer pipeline.

    A web address (http, https) is one if it ends like a video file or playlist, or if `web` says so.
    """
    if re.match(r"(rtsps?|rtmps?|udp|rtp|srt)://", source) or " ! " in source:
        return True
    if is_web_address(source):
        ending = PurePosixPath(urllib.parse.urlsplit(source).path).suffix.lower()
        return web or ending in (*VIDEO_EXTENSIONS, *_PLAYLISTS)
    if Path(source).suffix.lower() in VIDEO_EXTENSIONS:
        return True
    return source.isdigit() and not Path(source).exists()


def video_stem(source: str) -> str:
    """What results of `source` are named after."""
    if source.isdigit():
        return f"camera{source}"
    if is_web_address(source):
        return address_stem(source)
    if "://" in source or " ! " in source:
        return "stream"
    return Path(source).stem


def segment_video(
    segmenter: Segmenter,
    source: str,
    results: VideoResults | None = None,
    *,
    live: bool = False,
    max_frames: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Segment `source` frame by frame.

    Args:
        segmenter: the model.
        source: see `is_video`.
        results: what is written; None for nothing.
        live: drop frames rather than fall behind; a file is then played at its own speed.
        max_frames: number of frames after which the video ends; None for all.
        report: is called after each frame, from this thread.

    Raises:
        UserError: the source cannot be opened or holds no frame, or a result cannot be written.
    """
    capture, fps = _open(source)
    stop = threading.Event()
    start = time.monotonic()
    progress = Progress(0, 0, 0.0)
    with ExitStack() as stack:
        stack.callback(capture.release)
        writer = _Writer(results.open(stack, fps), segmenter) if results else None
        if writer is not None:
            stack.callback(writer.abandon)
        frames = _Reader(segmenter, capture, fps if live else None, stop, paced=live and not _is_stream(source))
        stack.callback(frames.join)
        stack.callback(stop.set)
        groups = ([frame] for frame in islice(frames, max_frames))
        try:
            for ((index, prepared),), (output,) in segmenter.forward_each(groups):
                if writer is not None:
                    writer.put(index, prepared, output)
                count = progress.frames + 1
                progress = Progress(count, index + 1 - count, time.monotonic() - start)
                report(progress)
        except KeyboardInterrupt:
            if not _is_stream(source):  # a camera has no end of its own: Ctrl-C ends the video and keeps it
                raise
        if not progress.frames:
            raise UserError(f"{without_credentials(source)}: holds no frame that OpenCV can decode")
        if writer is not None:
            writer.finish()
    return progress


def _is_stream(source: str) -> bool:
    return source.isdigit() or "://" in source or " ! " in source


def _open(source: str) -> tuple[Any, float]:
    import cv2

    if not _is_stream(source) and not Path(source).is_file():
        raise UserError(f"{source}: no such file")
    if source.isdigit():
        capture = cv2.VideoCapture(int(source))
    elif " ! " in source:
        capture = cv2.VideoCapture(source, cv2.CAP_GSTREAMER)
    else:
        capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        what = f"camera {source}" if source.isdigit() else without_credentials(source)
        hint = "; this OpenCV may be built without GStreamer" if " ! " in source else ""
        raise UserError(f"{what}: OpenCV cannot open it{hint}; check the name, the permissions and the codec")
    fps = capture.get(cv2.CAP_PROP_FPS)
    return capture, fps if 1 <= fps <= 1000 else _DEFAULT_FPS


class _Reader:
    """Decodes and prepares frames in a thread; yields (number of the frame, prepared frame)."""

    def __init__(
        self, segmenter: Segmenter, capture: Any, live_fps: float | None, stop: threading.Event, *, paced: bool
    ) -> None:
        self._segmenter, self._capture, self._stop = segmenter, capture, stop
        self._live, self._pause = live_fps is not None, 1 / live_fps if live_fps and paced else 0.0
        self._queue: queue.Queue[_Item] = queue.Queue(1 if self._live else _AHEAD)
        self._thread = threading.Thread(target=self._work, name="read video", daemon=True)
        self._thread.start()

    def __iter__(self) -> Any:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def join(self) -> None:
        """Wait until the thread has ended; `stop` must be set."""
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(0.05)

    def _work(self) -> None:
        import cv2

        try:
            index, due = 0, time.monotonic()
            while not self._stop.is_set():
                good, frame = self._capture.read()
                if not good:
                    break
                prepared = self._segmenter.prepare(np.ascontiguousarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
                due += self._pause
                time.sleep(max(due - time.monotonic(), 0.0))
                if self._live:  # the newest frame takes the place of one that nobody came for
                    _drain(self._queue)
                self._queue.put((index, prepared))
                index += 1
            self._queue.put(None)
        except Exception as error:  # raised in the thread that reads the frames
            self._queue.put(error)


class _Writer:
    """Finishes frames and hands them to the sinks, in a thread."""

    def __init__(self, sinks: list[FrameSink], segmenter: Segmenter) -> None:
        self._sinks, self._segmenter = sinks, segmenter
        self._queue: queue.Queue[_Item] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write video", daemon=True)
        self._thread.start()

    def put(self, index: int, prepared: PreparedImage, output: npt.NDArray[Any]) -> None:
        """Hand over a frame. Raises what went wrong with an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put((index, prepared, output))

    def finish(self) -> None:
        """Write what is waiting and close the files. Raises what went wrong."""
        self.abandon()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End the thread when all queued frames are written."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                index, prepared, output = item
                frame = self._segmenter.finish(prepared, output)
                for sink in self._sinks:
                    sink.write(index, frame)
        except Exception as error:
            self._error = error
            while self._queue.get() is not None:  # the thread that puts frames must not wait for ever
                continue
        finally:
            for sink in self._sinks:
                sink.close()


def _drain(items: queue.Queue[_Item]) -> None:
    try:
        while True:
            items.get_nowait()
    except queue.Empty:
        return

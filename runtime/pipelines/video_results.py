# SPDX-License-Identifier: Apache-2.0
"""What is written for a video: an overlay video, the classes of each frame, the label map of each frame."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_path, atomic_write, make_folder
from internimage_deploy.runtime.imaging.results import LABELS, ResultOptions
from internimage_deploy.runtime.imaging.segmentation import Segmentation


@dataclass(frozen=True)
class VideoResults:
    """Where the results of a video go; None for those that are not written.

    Attributes:
        overlay: an .mp4 or .avi file at the source's size and speed. A frame that was dropped shows the last one that
            was segmented.
        frames_json: a file with a JSON line for each frame: `{"frame", "seconds"}` and `Segmentation.summary()`.
        frames_folder: a folder for FRAME.labels.png, the number of the frame in six digits.
        options: how labels and overlays look.
    """

    overlay: Path | None = None
    frames_json: Path | None = None
    frames_folder: Path | None = None
    options: ResultOptions = field(default_factory=ResultOptions)

    def __bool__(self) -> bool:
        """True when anything is written."""
        return any(path is not None for path in (self.overlay, self.frames_json, self.frames_folder))

    @property
    def paths(self) -> list[Path]:
        """Everything that is written."""
        return [path for path in (self.overlay, self.frames_json, self.frames_folder) if path is not None]

    def open(self, stack: ExitStack, fps: float) -> list[FrameSink]:
        """The writers of each result; the files take their places when `stack` is left without an error."""
        sinks: list[FrameSink] = []
        for path in self.paths:
            make_folder(path.parent)
        if self.overlay is not None:
            sinks.append(_OverlayVideo(stack.enter_context(atomic_path(self.overlay)), fps, self.options))
        if self.frames_json is not None:
            sinks.append(_FramesJson(stack.enter_context(atomic_path(self.frames_json)), fps, self.options))
        if self.frames_folder is not None:
            make_folder(self.frames_folder)
            sinks.append(_FrameMasks(self.frames_folder, self.options))
        return sinks


class FrameSink(ABC):
    """Takes the frames of a video in order."""

    @abstractmethod
    def write(self, index: int, frame: Segmentation) -> None:
        """Take the frame of number `index`. Raises `UserError`."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Finish the file."""


class _OverlayVideo(FrameSink):
    def __init__(self, path: Path, fps: float, options: ResultOptions) -> None:
        self._path, self._fps, self._options = path, fps, options
        self._video: Any = None
        self._size: tuple[int, ...] = ()
        self._written = 0
        self._last: Any = None

    def write(self, index: int, frame: Segmentation) -> None:
        overlay = np.ascontiguousarray(frame.overlay(self._options.alpha, classes=self._options.classes)[:, :, ::-1])
        if self._video is None:
            self._size = overlay.shape
            self._video = self._create((overlay.shape[1], overlay.shape[0]))
        if overlay.shape != self._size:
            raise UserError(f"the video changes its size from {self._size[1]}x{self._size[0]} on the way")
        for _ in range(index - self._written):  # frames that were dropped
            self._video.write(overlay if self._last is None else self._last)
        self._video.write(overlay)
        self._last, self._written = overlay, index + 1

    def close(self) -> None:
        if self._video is not None:
            self._video.release()

    def _create(self, size: tuple[int, int]) -> Any:
        import cv2

        code = "MJPG" if self._path.suffix.lower() == ".avi" else "mp4v"
        video = cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*code), self._fps, size)
        if not video.isOpened():
            raise UserError(f"{self._path.name}: OpenCV cannot write {code} video here; name an .avi file instead")
        return video


class _FramesJson(FrameSink):
    def __init__(self, path: Path, fps: float, options: ResultOptions) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._fps, self._options = fps, options

    def write(self, index: int, frame: Segmentation) -> None:
        summary = frame.summary(self._options.classes)
        self._file.write(json.dumps({"frame": index, "seconds": round(index / self._fps, 4), **summary}) + "\n")

    def close(self) -> None:
        self._file.close()


class _FrameMasks(FrameSink):
    def __init__(self, folder: Path, options: ResultOptions) -> None:
        self._folder, self._options = folder, options

    def write(self, index: int, frame: Segmentation) -> None:
        atomic_write(self._folder / f"{index:06d}{LABELS}", frame.mask(self._options.mask))

# SPDX-License-Identifier: Apache-2.0
"""High-level API: load a model and segment images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.base import Backend, run_each
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine.profiles import batch_range
from internimage_deploy.runtime.imaging.augmentation import Augmentation
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS, ImageSource
from internimage_deploy.runtime.imaging.pipeline import (
    ImagePipeline,
    NetworkImage,
    PreparedImage,
    Resize,
    WindowChoice,
    images_per_run,
)
from internimage_deploy.runtime.imaging.postprocess import labels_from_probabilities
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.options import LoadOptions

Key = TypeVar("Key")
Ready = TypeVar("Ready", bound=NetworkImage)
Group = Sequence[tuple[Key, Ready]]
"""Images of one network size, each with what its caller knows it by."""


class Segmenter:
    """A segmentation model, loaded and ready.

    Example:
        >>> segmenter = Segmenter.load("model.onnx")             # doctest: +SKIP
        >>> segmenter("street.jpg").class_fractions()            # doctest: +SKIP
        {'road': 0.41, 'building': 0.3, ...}

    A call is `prepare` -> `forward` -> `finish`; a program that overlaps these may call them itself.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        resize: Resize = None,
        window: WindowChoice = None,
        batch: int = 1,
        max_pixels: int = MAX_PIXELS,
        augmentation: Augmentation | None = None,
    ) -> None:
        if not hasattr(backend, "card"):
            raise UserError(
                f"Segmenter() takes a loaded backend, got {type(backend).__name__}; use Segmenter.load(path)"
            )
        self.backend = backend
        self._closed = False
        self.card: ModelCard = backend.card
        self.pipeline = ImagePipeline(
            self.card, resize=resize, window=window, max_pixels=max_pixels, augmentation=augmentation
        )
        self.batch = self.card.batch or max(batch, 1)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
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
    ) -> Segmenter:
        """Load a model file, which `export-onnx` or `build-engine` wrote.

        The options are those of `LoadOptions`.

        Raises:
            UserError: the model cannot be loaded, or the options do not fit it.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UserError(f"Segmenter.load() takes the path of a model file, got {type(path).__name__}")
        options = LoadOptions(
            backend, threads, resize, window, batch, max_pixels, trust_engine, cuda_graphs, device, tuple(scales), flip
        )
        return cls.from_options(path, options)

    @classmethod
    def from_options(cls, path: str | Path, options: LoadOptions) -> Segmenter:
        """As `load`, with the options as one object."""
        backend = load_backend(
            Path(path),
            options.backend,
            threads=options.threads,
            window=options.window,
            logits=options.augmentation is not None,
            trust_engine=options.trust_engine,
            cuda_graphs=options.cuda_graphs,
            device=options.device,
        )
        return cls(
            backend,
            resize=options.resize,
            window=options.window,
            batch=options.batch,
            max_pixels=options.max_pixels,
            augmentation=options.augmentation,
        )

    @overload
    def __call__(self, images: ImageSource) -> Segmentation: ...  # type: ignore[overload-overlap] # a str is a sequence
    @overload
    def __call__(self, images: Iterable[ImageSource]) -> list[Segmentation]: ...
    def __call__(self, images: ImageSource | Iterable[ImageSource]) -> Segmentation | list[Segmentation]:
        """Segment an image, or a list of images.

        Args:
            images: paths, addresses, the content of image files, PIL images, or (H, W, 3) uint8 RGB arrays. Images of a
                list may differ in size; those that come to the same network size run together.

        Raises:
            UserError: an image cannot be read, or has the wrong type or shape.
        """
        if isinstance(images, (list, tuple, Iterator)) and not hasattr(images, "read"):
            return self._segment([self.prepare(image) for image in images])
        one: Any = images  # whatever else it is, `prepare` knows it or says what it expects
        return self._segment([self.prepare(one)])[0]

    def probabilities(self, image: ImageSource) -> npt.NDArray[np.float32]:
        """Softmax over the classes for one image; see `ImagePipeline.probabilities` for what it means for Mask2Former.

        Returns:
            (classes, H, W) float32 at the image's own size; 4 x classes bytes a pixel.

        Raises:
            UserError: the model returns labels (export it with --emit logits), or the image cannot be read.
        """
        prepared = self.prepare(image)
        if prepared.views:
            return self._averaged(prepared)
        (output,) = self.forward([prepared])
        return self.pipeline.probabilities(output, prepared.geometry)

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Read, decode and resize one image; may be called from any thread. Raises `UserError`."""
        return self.pipeline.prepare(image)

    def forward(self, images: Sequence[NetworkImage]) -> list[npt.NDArray[Any]]:
        """Run the network on images of one network size.

        Returns:
            Per image, labels (h, w) or logits (classes, h/4, w/4), as the card says; with a window, the logits of its
            crops (crops, classes, h/4, w/4); with test-time augmentation, the labels (H, W).
        """
        if not images:
            return []
        ((_, outputs),) = self.forward_each([[(None, image) for image in images]])
        return outputs

    def forward_each(
        self,
        groups: Iterable[Group[Key, Ready]],
        on_error: Callable[[Group[Key, Ready], UserError], None] | None = None,
    ) -> Iterator[tuple[Group[Key, Ready], list[npt.NDArray[Any]]]]:
        """(group, outputs) for each group of (key, image) pairs, in order; outputs are those of `forward`.

        The images of a group have one network size. Where the backend can, the next batch is under way before the
        output of one is waited for.

        Args:
            groups: at most `images_per_run` images each: what is one run of the network, or the crops of one image.
            on_error: called with a group that failed, which is then left out; None raises the error.

        Raises:
            UserError: a group failed, and there is no `on_error`.
        """
        if self.pipeline.augmentation is None:
            yield from self._forward_groups(groups, on_error)
            return
        for group in groups:
            try:
                # Labels, for the probabilities of the images that wait to be written would fill the memory.
                outputs: list[npt.NDArray[Any]] = [
                    labels_from_probabilities(self._averaged(image)) for _, image in group
                ]
            except UserError as error:
                if on_error is None:
                    raise
                on_error(group, error)
            else:
                yield group, outputs

    def _averaged(self, image: NetworkImage) -> npt.NDArray[np.float32]:
        """The averaged probabilities (classes, H, W) of an image's views; those of one size run together."""
        if not isinstance(image, PreparedImage):
            raise TypeError("test-time augmentation takes images from `prepare`")
        groups = ([(view, view) for view in views] for _, views in groupby(image.views, lambda view: view.size))
        each = self._forward_groups(groups, None)
        views = ((view, output) for group, outputs in each for (view, _), output in zip(group, outputs, strict=True))
        try:
            return self.pipeline.mean_probabilities(views)
        except MemoryError as error:
            height, width = image.geometry.image
            raise UserError(
                f"not enough memory for the probabilities of {width}x{height} pixels and {len(self.card.classes)} "
                "classes; leave test-time augmentation out, or use smaller images"
            ) from error

    def _forward_groups(
        self, groups: Iterable[Group[Key, Ready]], on_error: Callable[[Group[Key, Ready], UserError], None] | None
    ) -> Iterator[tuple[Group[Key, Ready], list[npt.NDArray[Any]]]]:
        """`forward_each` for what the network sees of each image."""
        outputs: npt.NDArray[Any] | None = None
        failure: UserError | None = None
        for (group, part, total), output in run_each(self.backend, self._batches(groups)):
            if isinstance(output, UserError):
                failure = output
                if on_error is None:
                    raise failure
            elif part == slice(0, total):
                outputs = output[:total]
            else:  # in place: the logits of many crops are not to be in memory twice
                if outputs is None:
                    outputs = np.empty((total, *output.shape[1:]), output.dtype)
                outputs[part] = output[: part.stop - part.start]
            if part.stop < total:
                continue
            if failure is None:
                assert outputs is not None
                yield group, self._by_image(outputs, len(group))
            elif on_error is not None:
                on_error(group, failure)
            outputs, failure = None, None

    def finish(self, prepared: PreparedImage, output: npt.NDArray[Any]) -> Segmentation:
        """The result for one image from what `forward` returned for it; may be called from any thread."""
        return self.pipeline.result(prepared, self.pipeline.labels(output, prepared.geometry))

    def close(self) -> None:
        """Free the network; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.backend.close()

    def __repr__(self) -> str:
        card = self.backend.card
        return f"<Segmenter {card.architecture} of {len(card.classes)} classes in {self.backend.name}>"

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _segment(self, images: list[PreparedImage]) -> list[Segmentation]:
        by_size: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append((index, image))
        groups = [
            group[start : start + count]
            for group in by_size.values()
            for count in [images_per_run(group[0][1], self.batch)]
            for start in range(0, len(group), count)
        ]
        results: dict[int, Segmentation] = {}
        for group, outputs in self.forward_each(groups):
            for (index, image), output in zip(group, outputs, strict=True):
                results[index] = self.finish(image, output)
        return [results[index] for index in range(len(images))]

    def _by_image(self, outputs: npt.NDArray[Any], images: int) -> list[npt.NDArray[Any]]:
        """A group's outputs, split into one for each image."""
        if self.pipeline.window is not None:
            outputs = outputs.reshape(images, -1, *outputs.shape[1:])
        return list(outputs)

    def _batches(
        self, groups: Iterable[Group[Key, Ready]]
    ) -> Iterator[tuple[tuple[Group[Key, Ready], slice, int], npt.NDArray[Any]]]:
        """((group, which of its crops are in the batch, number of its crops), batch) one after another."""
        for group in groups:
            pixels = [crop for _, image in group for crop in self.pipeline.crops(image)]
            # An engine may take fewer than were asked for: then a slid image would not run at all.
            _, most = batch_range(self.card, (pixels[0].shape[0], pixels[0].shape[1]))
            step = min(self.batch, most)
            for start in range(0, len(pixels), step):
                part = slice(start, min(start + step, len(pixels)))
                yield (group, part, len(pixels)), self.pipeline.network_input(pixels[part])

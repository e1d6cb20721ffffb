# SPDX-License-Identifier: Apache-2.0
"""The door of the runtime: a loaded model that turns pictures into labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime import postprocess, preprocess, sliding
from internimage_deploy.runtime.backends.base import Backend, answers, load_backend
from internimage_deploy.runtime.card import ModelCard
from internimage_deploy.runtime.images import MAX_PIXELS, check_array, read_image
from internimage_deploy.runtime.segmentation import Segmentation
from internimage_deploy.runtime.sliding import Window

Picture = str | Path | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prepared:
    """A picture ready for the network: itself, at network size, and the way back."""

    image: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    network: npt.NDArray[np.uint8]  # (h, w, 3) RGB
    geometry: preprocess.Geometry


class Segmenter:
    """A segmentation model, loaded and ready.

    Example:
        >>> segmenter = Segmenter.load("model.onnx")      # doctest: +SKIP
        >>> segmenter("street.jpg").shares()              # doctest: +SKIP
        {'road': 0.41, 'building': 0.3, ...}

    A call is `prepare` -> `forward` -> `finish`; a program that overlaps these may call them itself.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        resize: tuple[int, int] | Literal["own"] | None = None,
        window: Literal["slide"] | Window | None = None,
        batch: int = 1,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.backend = backend
        self.card: ModelCard = backend.card
        self.max_pixels = max_pixels
        self.batch = self.card.batch or max(batch, 1)
        self.window = _window(self.card, window)
        self.resize = self.card.resize if resize is None else None if resize == "own" else resize
        if resize is not None and not self.card.is_dynamic and self.window is None:
            raise UserError(
                f"this model takes one size, {_size(self.card.network_size)}, so resize has no effect; "
                "leave it out, use the sliding window, or export with --dynamic"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        threads: int | None = None,
        resize: tuple[int, int] | Literal["own"] | None = None,
        window: Literal["slide"] | Window | None = None,
        batch: int = 1,
        max_pixels: int = MAX_PIXELS,
        trust_engine: bool = False,
        cuda_graphs: bool = True,
    ) -> Segmenter:
        """Load a model file.

        Args:
            path: what `export-onnx` or `build-engine` wrote.
            backend: one of `internimage_deploy.runtime.backends.base.REGISTRY`, or "auto".
            threads: CPU threads; None for all this process may use.
            resize: (long, short) in pixels to fit pictures into, keeping their ratio; "own" for no resizing; None for
                what the model card says. Only for models of free size, or with a window.
            window: None to give the network the whole picture, "slide" for a sliding window of the network's fixed
                size, or a `Window`. Needs a model that answers logits.
            batch: most pictures (or crops) in one run of the network; a model of fixed batch ignores it.
            max_pixels: refuse picture files with more pixels.
            trust_engine: let an engine run the code it carries, which version-compatible engines do.
            cuda_graphs: let engines record their launches and replay them.

        Raises:
            UserError: the model cannot be loaded, or the options do not fit it.
        """
        loaded = load_backend(Path(path), backend, threads=threads, trust_engine=trust_engine, cuda_graphs=cuda_graphs)
        return cls(loaded, resize=resize, window=window, batch=batch, max_pixels=max_pixels)

    @overload
    def __call__(self, pictures: Picture) -> Segmentation: ...
    @overload
    def __call__(self, pictures: Iterable[Picture]) -> list[Segmentation]: ...
    def __call__(self, pictures: Picture | Iterable[Picture]) -> Segmentation | list[Segmentation]:
        """Segment a picture, or a list of pictures.

        Args:
            pictures: paths, or (H, W, 3) uint8 RGB arrays. Pictures of a list may differ in size; those that come to
                the same network size run together.

        Raises:
            UserError: a picture cannot be read, or has the wrong type or shape.
        """
        if isinstance(pictures, (str, Path, np.ndarray)):
            return self._segment([self.prepare(pictures)])[0]
        return self._segment([self.prepare(picture) for picture in pictures])

    def prepare(self, picture: Picture) -> Prepared:
        """Decode (paths) and resize one picture; may be called from any thread. Raises `UserError`."""
        if isinstance(picture, (str, Path)):
            image = read_image(picture, max_pixels=self.max_pixels)
        else:
            image = check_array(picture)
        geometry = self.geometry((image.shape[0], image.shape[1]))
        return Prepared(image, preprocess.resize_picture(image, geometry, self.card.mean), geometry)

    def geometry(self, image: tuple[int, int]) -> preprocess.Geometry:
        """Sizes on the way into the network for a picture of (height, width)."""
        height, width = self.card.network_size
        if isinstance(height, int) and isinstance(width, int):
            if self.window is None:
                return preprocess.fixed_geometry(image, (height, width))
            free = preprocess.free_geometry(image, self.resize, self.card.size_divisor)
            filled = (max(free.network[0], height), max(free.network[1], width))
            return preprocess.Geometry(image, free.keep_ratio, free.content, filled)
        return preprocess.free_geometry(image, self.resize, self.card.size_divisor)

    def forward(self, group: Sequence[Prepared]) -> list[npt.NDArray[Any]]:
        """Run the network on `group`, whose pictures have one network size.

        Returns:
            Per picture, labels (h, w) or logits (classes, h/4, w/4), as the card says; with a window, the logits of
            its crops (crops, classes, h/4, w/4).
        """
        if self.window is None:
            return list(self._run([item.network for item in group]))
        places = sliding.crops(group[0].geometry.network, self.window)
        return [self._run([item.network[place] for place in places]) for item in group]

    def forward_each(self, groups: Iterable[Sequence[Prepared]]) -> Iterator[list[npt.NDArray[Any]]]:
        """`forward` for one group of at most `batch` after another.

        Where the backend can, the next group is under way before the answers to one are waited for.
        """
        if self.window is None:
            yield from map(list, self._stream([item.network for item in group] for group in groups))
        else:
            yield from map(self.forward, groups)

    def finish(self, prepared: Prepared, answer: npt.NDArray[Any]) -> Segmentation:
        """The result for one picture from what `forward` answered to it; may be called from any thread."""
        geometry, classes = prepared.geometry, len(self.card.classes)
        labels: postprocess.Labels
        if self.window is not None:
            places = sliding.crops(geometry.network, self.window)
            labels = sliding.labels_from_crops(list(answer), places, geometry)
        elif self.card.emits_labels:
            labels = postprocess.labels_from_labels(answer, geometry, classes)
        else:
            labels = postprocess.labels_from_logits(answer, geometry)
        return Segmentation(labels, self.card.classes, self.card.palette, prepared.image)

    def close(self) -> None:
        """Free the network."""
        self.backend.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _segment(self, items: list[Prepared]) -> list[Segmentation]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item.geometry.network, []).append(index)
        results: dict[int, Segmentation] = {}
        for indices in groups.values():
            parts = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
            pictures = ([items[index] for index in part] for part in parts)
            for part, found in zip(parts, self.forward_each(pictures), strict=True):
                for index, answer in zip(part, found, strict=True):
                    results[index] = self.finish(items[index], answer)
        return [results[index] for index in range(len(items))]

    def _run(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[Any]:
        """The network's answers to `pictures` of one size, `self.batch` at a time."""
        found = list(self._stream([pictures[i : i + self.batch] for i in range(0, len(pictures), self.batch)]))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _stream(self, parts: Iterable[Sequence[npt.NDArray[np.uint8]]]) -> Iterator[npt.NDArray[Any]]:
        """The answers to each part of at most `batch` pictures, the next one started before one is waited for."""
        sizes: deque[int] = deque()

        def batches() -> Iterator[npt.NDArray[Any]]:
            for part in parts:
                sizes.append(len(part))
                yield preprocess.network_input([*part, *[part[-1]] * ((self.card.batch or 0) - len(part))], self.card)

        for answer in answers(self.backend, batches()):
            yield answer[: sizes.popleft()]


def _window(card: ModelCard, asked: Literal["slide"] | Window | None) -> Window | None:
    if asked is None:
        return None
    if card.emits_labels:
        raise UserError(
            "the sliding window averages logits, and this model answers labels; export it with --emit logits"
        )
    height, width = card.network_size
    if isinstance(asked, Window):
        fixed = not card.is_dynamic and asked.crop != (height, width)
        if fixed or any(side % card.size_divisor for side in asked.crop):
            wanted = f"{_size(card.network_size)}" if fixed else f"multiples of {card.size_divisor}"
            raise UserError(f"window of {_size(asked.crop)}, this model expects {wanted}")
        return asked
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UserError("this model takes any size, so the sliding window needs one: give the crop, such as 512x512")
    return Window((height, width), sliding.default_stride((height, width)))


def _size(size: tuple[int | str, int | str]) -> str:
    return f"{size[0]}x{size[1]}"

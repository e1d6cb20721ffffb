# SPDX-License-Identifier: Apache-2.0
"""The work before and after the network: decode and resize an image, turn the network's output into its labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging import postprocess, preprocess, sliding
from internimage_deploy.runtime.imaging.augmentation import Augmentation, mirrored, scaled_limit
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS, ImageSource, load_image
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.window import Window, default_stride

# Rounding up to the model's divisor makes at most so many times the pixels that are allowed, or so many pixels.
_ROUNDING, _ROUNDING_PIXELS = 2, 1 << 20
# Overlapping crops make at most so many times the pixels of an image: a stride of an eighth of the crop makes as many.
# Crops of less than 32x32 count as such.
_OVERLAP, _MIN_CROP_PIXELS = 64, 32 * 32

Resize = tuple[int, int] | Literal["own"] | None
WindowChoice = Literal["slide", "whole"] | Window | None
"""How images reach the network; see `LoadOptions`."""


@dataclass(frozen=True)
class NetworkImage:
    """An image at network scale, and the way back to its own size."""

    pixels: npt.NDArray[np.uint8]  # (h, w, 3) RGB
    geometry: preprocess.Geometry
    crop_count: int = field(default=1, kw_only=True)  # of `ImagePipeline.crops`: how often the network runs for it
    mirrored: bool = field(default=False, kw_only=True)  # left to right

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of `pixels`; images of one size can run together."""
        return self.geometry.network


@dataclass(frozen=True)
class PreparedImage(NetworkImage):
    """An image ready for the network, with the image itself and where it came from."""

    image: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    source: str = ""  # path or address; empty for one that has none
    views: tuple[NetworkImage, ...] = ()  # with test-time augmentation, what the network sees in place of `pixels`

    def for_network(self) -> NetworkImage:
        """Without the image itself: what another process needs."""
        return NetworkImage(self.pixels, self.geometry, crop_count=self.crop_count)


def images_per_run(image: NetworkImage, batch: int) -> int:
    """How many images of the size of `image` fill a run of `batch` images or crops; at least 1.

    The logits of all crops are in memory until they are averaged: more images together would only cost memory.
    """
    return max(batch // image.crop_count, 1)


class ImagePipeline:
    """Everything about segmenting an image except the network; it needs the model card only.

    Args:
        card: what the model takes and returns.
        resize: see `LoadOptions`.
        window: see `LoadOptions`.
        max_pixels: image files with more pixels are refused.
        augmentation: `LoadOptions.augmentation`.

    Raises:
        UserError: the options do not fit the model.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        resize: Resize = None,
        window: WindowChoice = None,
        max_pixels: int = MAX_PIXELS,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.card = card
        self.max_pixels = max_pixels
        self.augmentation = augmentation
        self.window = _window(card, window)
        self.resize = card.resize if resize is None else None if resize == "own" else resize
        if resize is not None and not card.is_dynamic and self.window is None:
            raise UserError(
                f"this model takes one size, {_size(card.network_size)}, so resize has no effect; "
                "leave it out, use the sliding window, or export with --dynamic"
            )
        if augmentation is not None:
            _check_augmentation(card, augmentation, slides=self.window is not None)

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Read, decode and resize one image, see `load_image`; may be called from any thread. Raises `UserError`."""
        array = load_image(image, max_pixels=self.max_pixels)
        source = str(image) if isinstance(image, (str, Path)) else ""
        if self.augmentation is None:
            view = self._view(array, 1.0)
            return PreparedImage(view.pixels, view.geometry, array, source, crop_count=view.crop_count)
        views = tuple(self._view(array, scale, turned=turned) for scale, turned in self.augmentation.views)
        count = sum(view.crop_count for view in views)
        return PreparedImage(views[0].pixels, views[0].geometry, array, source, views, crop_count=count)

    def _view(self, array: npt.NDArray[np.uint8], scale: float, *, turned: bool = False) -> NetworkImage:
        """`array` (H, W, 3) as the network sees it. Raises `UserError`."""
        geometry = self.geometry((array.shape[0], array.shape[1]), scale)
        limit = max(self.max_pixels, array.shape[0] * array.shape[1])
        before_rounding = math.prod(side - self.card.size_divisor for side in geometry.network)
        most = max(_ROUNDING * limit, _ROUNDING_PIXELS)  # a very long image has many times its pixels then
        if before_rounding > limit or math.prod(geometry.network) > most:
            raise UserError(
                f"the network's input for this image would be {_size(geometry.network)}, the limit is "
                f"{self.max_pixels:,} pixels; use a smaller resize or scale"
            )
        crop_count = self._checked_crop_count(geometry.network)
        pixels = preprocess.resize_image(array, geometry, self.card.mean)
        if turned:
            pixels = mirrored(pixels, geometry.content)
        return NetworkImage(pixels, geometry, crop_count=crop_count, mirrored=turned)

    def geometry(self, image: tuple[int, int], scale: float = 1.0) -> preprocess.Geometry:
        """Sizes on the way into the network for an image of (height, width), or for a view of it."""
        height, width = self.card.network_size
        resize = scaled_limit(self.resize, image, scale)
        if isinstance(height, int) and isinstance(width, int):
            if self.window is None:
                return preprocess.fixed_geometry(image, (height, width))
            free = preprocess.free_geometry(image, resize, self.card.size_divisor)
            padded = (max(free.network[0], height), max(free.network[1], width))
            return preprocess.Geometry(image, free.keep_ratio, free.content, padded)
        return preprocess.free_geometry(image, resize, self.card.size_divisor)

    def network_input(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[Any]:
        """Images of one size as the network's batch; a model of fixed batch gets the last image repeated."""
        padding = [images[-1]] * ((self.card.batch or 0) - len(images))
        return preprocess.network_input([*images, *padding], self.card)

    def crops(self, image: NetworkImage) -> list[npt.NDArray[np.uint8]]:
        """What the network sees of `image`: its pixels, or with a window one crop after another."""
        return [image.pixels[place] for place in self._places(image.geometry)]

    def crop_bytes(self, image: tuple[int, int]) -> int:
        """Bytes of the logits of all crops of an image of (height, width); 0 without a window.

        They are all in memory before they are averaged, where an image that is seen as a whole has its logits alone.
        """
        if self.window is None:
            return 0
        network = self.geometry(image).network
        height, width = map(min, self.window.crop, network)
        cells = self._crop_count(network) * (height // 4) * (width // 4)
        return cells * len(self.card.classes) * np.dtype(self.card.output.dtype).itemsize

    def labels(self, output: npt.NDArray[Any], geometry: preprocess.Geometry) -> postprocess.Labels:
        """Labels (H, W) at the image's own size; may be called from any thread.

        Args:
            output: for one image, labels (h, w) or logits (classes, h/4, w/4) as the card says; with a window, the
                logits of its crops (crops, classes, h/4, w/4); with test-time augmentation, the labels (H, W).
            geometry: of the image.

        Raises:
            UserError: the output is not what the card says, or holds NaN.
        """
        if self.augmentation is not None:
            return output
        if self.window is not None:
            plane = self._plane(output, geometry)
            return postprocess.labels_from_planes(plane, len(self.card.classes), geometry)
        if self.card.emits_labels:
            return postprocess.labels_from_labels(output, geometry, len(self.card.classes))
        return postprocess.labels_from_logits(output, geometry)

    def probabilities(self, output: npt.NDArray[Any], geometry: preprocess.Geometry) -> npt.NDArray[np.float32]:
        """Softmax over the classes at the image's own size: (classes, H, W); arguments as in `labels`.

        For a Mask2Former it is a softmax of semantic scores between 0 and the number of queries. The official code
        computes the same before it averages over scales and flips; the values rank the classes, and are no
        probabilities that a loss was trained on.

        Raises:
            UserError: the model returns labels, or the output holds NaN.
        """
        if self.card.emits_labels:
            raise UserError("this model returns labels, not probabilities; export it with --emit logits")
        return postprocess.probabilities_from_planes(self._plane(output, geometry), len(self.card.classes), geometry)

    def mean_probabilities(self, views: Iterable[tuple[NetworkImage, npt.NDArray[Any]]]) -> npt.NDArray[np.float32]:
        """The mean of the softmax of an image's `views` (view, output): (classes, H, W) at the image's own size.

        Needs 8 x classes bytes a pixel. Raises `UserError` where an output holds NaN.
        """
        total: npt.NDArray[np.float32] | None = None
        count = 0
        for view, output in views:
            scores = self.probabilities(output, view.geometry)
            count += 1
            if view.mirrored:
                scores = scores[:, :, ::-1]
            total = np.ascontiguousarray(scores) if total is None else np.add(total, scores, out=total)
        assert total is not None
        total /= count
        return total

    def _plane(self, output: npt.NDArray[Any], geometry: preprocess.Geometry) -> postprocess.Plane:
        if self.window is None:
            return postprocess.planes_of_logits(output, geometry)
        return sliding.planes_of_crops(list(output), self._places(geometry), geometry)

    def _crop_count(self, network: tuple[int, int]) -> int:
        return 1 if self.window is None else sliding.crop_count(network, self.window)

    def _checked_crop_count(self, network: tuple[int, int]) -> int:
        """As `_crop_count`. Raises `UserError` where crops are so small or overlap so much that the work has no end."""
        count = self._crop_count(network)
        if self.window is not None:
            crop = max(math.prod(map(min, self.window.crop, network)), _MIN_CROP_PIXELS)
            if count * crop > _OVERLAP * max(math.prod(network), _MIN_CROP_PIXELS):
                raise UserError(
                    f"the sliding window would run {count:,} crops of {_size(self.window.crop)} with stride "
                    f"{_size(self.window.stride)} on an input of {_size(network)}; use a larger stride or crop"
                )
        return count

    def _places(self, geometry: preprocess.Geometry) -> list[tuple[slice, slice]]:
        """(rows, columns) of every crop at network scale; without a window, of the image alone."""
        return sliding.crops(geometry.network, self.window or Window(geometry.network, geometry.network))

    def result(self, prepared: PreparedImage, labels: postprocess.Labels) -> Segmentation:
        """The labels of an image with the model's class names and colours."""
        return Segmentation(labels, self.card.classes, self.card.palette, prepared.image, prepared.source)


def slides(card: ModelCard, choice: WindowChoice) -> bool:
    """Whether images are cut into crops: as chosen, and where nothing is chosen, as the model was evaluated."""
    return choice != "whole" and (choice is not None or card.window is not None)


def _check_augmentation(card: ModelCard, augmentation: Augmentation, *, slides: bool) -> None:
    """Raises `UserError` where the model cannot take `augmentation`."""
    if card.emits_labels:
        export = "export it" if card.engine is None else "build the engine from an export"
        raise UserError(
            f"test-time augmentation averages probabilities, and this model returns labels; {export} with --emit logits"
        )
    if augmentation.scales != (1.0,) and not card.is_dynamic and not slides:
        raise UserError(
            f"this model takes one size, {_size(card.network_size)}, so scales have no effect; use --flip alone, the "
            "sliding window (--slide), or an export for any size"
        )


def _window(card: ModelCard, choice: WindowChoice) -> Window | None:
    if not slides(card, choice):
        return None
    if card.emits_labels:
        export = "export it" if card.engine is None else "build the engine from an export"
        whole = ", or give it whole images: --whole" if choice is None else ""
        raise UserError(
            f"the sliding window averages logits, and this model returns labels; {export} with --emit logits{whole}"
        )
    height, width = card.network_size
    if isinstance(choice, Window):
        fixed = not card.is_dynamic and choice.crop != (height, width)
        if fixed or any(side % card.size_divisor for side in choice.crop):
            expected = f"{_size(card.network_size)}" if fixed else f"multiples of {card.size_divisor}"
            raise UserError(f"window of {_size(choice.crop)}, this model expects {expected}")
        return choice
    if isinstance(height, int) and isinstance(width, int):
        size = (height, width)
        return Window(size, default_stride(size)) if card.window is None else card.window.scaled_to(size)
    if card.window is None:
        raise UserError(
            "this model takes any size, so the sliding window needs one: give the crop, such as --crop 512x512 "
            "(window=Window((512, 512), (341, 341)))"
        )
    return card.window


def _size(size: tuple[int | str, int | str]) -> str:
    return f"{size[0]}x{size[1]}"

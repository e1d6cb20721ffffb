# SPDX-License-Identifier: Apache-2.0
"""Checks of a model file: ONNX's rules, its card, single images against batches, and comparison with another file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import Array, ModelCard, TensorSpec
from internimage_deploy.errors import UserError, one_line
from internimage_deploy.onnx_tools.model_file import card_of, read_model
from internimage_deploy.runtime.backends.base import Backend
from internimage_deploy.runtime.engine.profiles import batch_range
from internimage_deploy.runtime.imaging.image_io import load_image
from internimage_deploy.runtime.imaging.postprocess import labels_from_logits
from internimage_deploy.runtime.imaging.preprocess import Geometry, network_input
from internimage_deploy.runtime.segmenter import Segmenter

if TYPE_CHECKING:
    import onnx

# Non-square, and one that no power of two divides into equal parts: pyramid pooling has uneven bins there.
_FREE_SIZES = ((64, 64), (96, 160), (224, 128))


@dataclass(frozen=True)
class Run:
    """One run of a network on random images.

    Attributes:
        batch: number of images.
        shape, dtype: of the output.
        milliseconds: duration of the run.
        batch_difference: how the outputs of single images differ from those in a batch, in words; None for a model that
            takes one of the two only.
    """

    batch: int
    shape: tuple[int, ...]
    dtype: str
    milliseconds: float
    batch_difference: str | None


@dataclass(frozen=True)
class Comparison:
    """The differences between two networks.

    Attributes:
        agreement: fraction of pixels with the same label.
        max_error: largest difference of their logits; None where one of them returns labels.
        default_limit: the `max_error` that two float32 networks stay below; None for other precisions.
    """

    agreement: float
    max_error: float | None
    default_limit: float | None


@dataclass(frozen=True)
class ImageComparison:
    """The differences between two models on an image.

    Attributes:
        name: of the image.
        agreement: fraction of the image's pixels with the same label.
        pixels: number of the image's pixels; 0 for an image that was not compared.
        error: why it was not compared; empty where it was.
    """

    name: str
    agreement: float
    pixels: int
    error: str = ""


def check_file(path: Path) -> None:
    """Check `path` with ONNX's full checker, and its card against its graph. Raises `UserError`."""
    import onnx

    model = read_model(path)
    card = card_of(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)  # by path: a model may be larger than a message can be
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{path}: breaks the ONNX rules ({one_line(error)})") from error
    for kind, spec, values in (("input", card.input, model.graph.input), ("output", card.output, model.graph.output)):
        if [value.name for value in values] != [spec.name]:
            names = [value.name for value in values]
            raise UserError(f"{path}: the graph's {kind} is {names}, its model card says ['{spec.name}']")
        _check_tensor(values[0], spec, f"{path}: {kind} '{spec.name}'")


def default_sizes(card: ModelCard) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) in pixels to run a model at: its own, an engine's smallest and typical ones, or three."""
    height, width = card.network_size
    if isinstance(height, int) and isinstance(width, int):
        return ((height, width),)
    if card.engine is not None and card.engine.profiles:
        bounds = [profile[bound] for profile in card.engine.profiles for bound in ("min", "opt")]
        return tuple(dict.fromkeys((height, width) for _, height, width in bounds))
    return _FREE_SIZES


def common_sizes(first: ModelCard, second: ModelCard) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) to compare two models at: the default ones of one of them that both take; else none.

    The fixed size of either comes first, then the sizes of an engine's profiles, then those of a model that takes any.
    """
    for card in sorted((first, second), key=lambda card: (card.is_dynamic, card.engine is None)):
        if sizes := tuple(size for size in default_sizes(card) if _takes(first, size) and _takes(second, size)):
            return sizes
    return ()


def check_comparable(first: ModelCard, second: ModelCard) -> None:
    """Check that the labels of two models mean the same. Raises `UserError`."""
    if len(first.classes) != len(second.classes):
        raise UserError(f"the models have {len(first.classes)} and {len(second.classes)} classes; nothing to compare")


def random_images(count: int, size: tuple[int, int], seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """`count` images (height, width, 3) uint8 of coarse patches and fine noise, the same for the same `seed`."""
    import cv2

    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.uniform(0, 255, (max(size[0] // 16, 2), max(size[1] // 16, 2), 3)).astype(np.float32)
        patches = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
        images.append(np.clip(patches + rng.normal(0, 12, patches.shape), 0, 255).astype(np.uint8))
    return images


def run_alone(network: Backend, size: tuple[int, int]) -> Run:
    """Run `network` at `size` and check its output. Raises `UserError` for a wrong shape, type or value."""
    card = network.card
    check_size(card, size)
    smallest, largest = batch_range(card, size)
    batch = min(max(2, smallest), largest)
    images = random_images(batch, size)
    start = time.perf_counter()
    output = network.run(network_input(images, card))
    milliseconds = 1000 * (time.perf_counter() - start)
    expected = (batch, *size) if card.emits_labels else (batch, len(card.classes), size[0] // 4, size[1] // 4)
    if output.shape != expected or output.dtype != np.dtype(card.output.dtype):
        raise UserError(
            f"at {size[0]}x{size[1]} the network returned {output.dtype} {output.shape}, "
            f"expected {card.output.dtype} {expected}; export the model again"
        )
    if card.emits_labels and int(output.max()) >= len(card.classes):
        raise UserError(f"the network returned label {int(output.max())}, the card names {len(card.classes)} classes")
    if not card.emits_labels and not np.isfinite(output).all():
        raise UserError(f"at {size[0]}x{size[1]} the network produced NaN or infinity")
    difference = None
    if smallest == 1 and batch > 1:
        single = [network.run(network_input([image], card)) for image in images]
        difference = _compare_with_single(output, single, card)
    return Run(batch, output.shape, str(output.dtype), milliseconds, difference)


def compare(first: Backend, second: Backend, size: tuple[int, int]) -> Comparison:
    """Compare two networks on the same random images at `size`. Raises `UserError` if they cannot be compared."""
    for network in (first, second):
        check_size(network.card, size)
    check_comparable(first.card, second.card)
    images = random_images(2, size)
    outputs = [np.concatenate([_run_single(network, image, size) for image in images]) for network in (first, second)]
    labels = [_labels(network.card, output, size) for network, output in zip((first, second), outputs, strict=True)]
    agreement = float((labels[0] == labels[1]).mean())
    if first.card.emits_labels or second.card.emits_labels:
        return Comparison(agreement, None, None)
    one, two = (output.astype(np.float32) for output in outputs)
    # A mask logit of a Mask2Former within rounding error of zero may fall on either side, and moves its query by more.
    masked = any(card.model.get("head", {}).get("type") == "Mask2FormerHead" for card in (first.card, second.card))
    exact = first.card.precision == second.card.precision == "fp32" and not masked
    return Comparison(agreement, float(np.abs(one - two).max()), 1e-3 * float(np.abs(two).max()) if exact else None)


def compare_images(first: Backend, second: Backend, paths: Iterable[Path]) -> Iterator[ImageComparison]:
    """Compare the labels that two models give image files, each after resizing as its model card says.

    An image that cannot be read, or whose size a model does not take, leaves the others alone: its comparison holds the
    reason.

    Raises:
        UserError: the models have different numbers of classes.
    """
    check_comparable(first.card, second.card)
    segmenters = (Segmenter(first), Segmenter(second))
    for path in paths:
        try:
            image = load_image(path)
            one, two = (segmenter(image).labels for segmenter in segmenters)
        except UserError as error:
            yield ImageComparison(str(path), 0.0, 0, str(error))
        else:
            yield ImageComparison(str(path), float((one == two).mean()), one.size)


def _run_single(network: Backend, image: npt.NDArray[np.uint8], size: tuple[int, int]) -> Array:
    smallest, _ = batch_range(network.card, size)
    return network.run(network_input([image] * smallest, network.card))[:1]


def _compare_with_single(batched: Array, single: list[Array], card: ModelCard) -> str:
    """How outputs of single images differ from those in a batch, in words. Raises `UserError` if they do by much."""
    alone = np.concatenate(single)
    if card.emits_labels:
        difference, limit = float((alone != batched).mean()), 0.01
        words = f"{difference:.2%} of the labels differ"
    else:
        difference = float(np.abs(alone.astype(np.float32) - batched.astype(np.float32)).max())
        limit = 0.02 * float(np.abs(alone).max())  # half precision sums in another order; a wrong stride is far off
        words = f"max difference {difference:.2g}"
    if difference > limit:
        raise UserError(f"the network's output for an image differs between a single run and a batch ({words})")
    return words


def _labels(card: ModelCard, output: Array, size: tuple[int, int]) -> Array:
    if card.emits_labels:
        return output
    return np.stack([labels_from_logits(logits, Geometry(size, size, size, size)) for logits in output])


def _takes(card: ModelCard, size: tuple[int, int]) -> bool:
    """True where the model runs at `size` (height, width): no other fixed size, and inside an engine's profile."""
    try:
        check_size(card, size)
    except UserError:
        return False
    if card.engine is None or not card.engine.profiles:
        return True
    return any(
        all(low <= side <= high for low, side, high in zip(profile["min"][1:], size, profile["max"][1:], strict=True))
        for profile in card.engine.profiles
    )


def check_size(card: ModelCard, size: tuple[int, int]) -> None:
    """Check that the model takes the input size (height, width). Raises `UserError`."""
    height, width = card.network_size
    if isinstance(height, int) and size != (height, width):
        raise UserError(f"the model takes one size, {height}x{width}, got {size[0]}x{size[1]}")
    if any(side % card.size_divisor for side in size):
        raise UserError(f"size {size[0]}x{size[1]}: expected multiples of {card.size_divisor}")


def _check_tensor(value: onnx.ValueInfoProto, spec: TensorSpec, where: str) -> None:
    from onnx import helper

    kind = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    if dtype != spec.dtype:
        raise UserError(f"{where} is {dtype} in the graph, its model card says {spec.dtype}; export the model again")
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    expected = [size if isinstance(size, int) else None for size in spec.shape]
    fits = len(dims) == len(expected) and all(
        None in pair or len(set(pair)) == 1 for pair in zip(dims, expected, strict=True)
    )
    if not fits:
        raise UserError(f"{where} is {dims} in the graph, its model card says {expected}; export the model again")

# SPDX-License-Identifier: Apache-2.0
"""The interface of backends: a loaded network that runs batches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from internimage_deploy.card import Array, ModelCard
from internimage_deploy.errors import UserError

if TYPE_CHECKING:
    from internimage_deploy.runtime.gpu.device_array import DeviceArray

Tag = TypeVar("Tag")
Handle = Callable[[], Array]
"""Waits for a batch that was started, and returns the network's output."""


class Backend(ABC):
    """A loaded network.

    Attributes:
        name: as in `REGISTRY`.
        card: what the model takes and returns.
        in_flight: batches that one thread should have started before it waits for the first: more than one where
            copying and computing overlap.
    """

    name: str
    card: ModelCard
    in_flight: int = 1

    @abstractmethod
    def run(self, batch: Array) -> Array:
        """The network's output for `batch`: input as `card.input` says, output as `card.output` says.

        Calls may come from several threads. Raises `UserError` where the machine is too small for the batch.
        """

    def submit(self, batch: Array) -> Handle:
        """Start a batch and return the function that waits for its output. Raises like `run`."""
        output = self.run(batch)
        return lambda: output

    def run_on_device(self, batch: object, *, stream: int | None = None) -> DeviceArray:
        """Run a GPU array (PyTorch, CuPy, ...); the output stays on the GPU.

        Args:
            batch: the input, as `card.input` says.
            stream: handle of the CUDA stream that the caller works on; None waits for the output.

        Raises:
            UserError: this backend does not run on a GPU, or the array does not fit the model.
        """
        raise UserError(f"the backend {self.name} takes NumPy arrays only; run an engine to keep arrays on the GPU")

    def measure(self, batch: Array) -> dict[str, float]:
        """Run a batch and time its parts: milliseconds by part, at least "run"."""
        start = time.perf_counter()
        self.run(batch)
        return {"run": 1e3 * (time.perf_counter() - start)}

    def close(self) -> None:  # noqa: B027 - most backends have nothing to free
        """Free the network; the backend cannot be used afterwards."""


def run_each(backend: Backend, batches: Iterable[tuple[Tag, Array]]) -> Iterator[tuple[Tag, Array | UserError]]:
    """(tag, output) for each (tag, batch), in order; `backend.in_flight` batches are in flight at a time.

    A batch that fails takes those in flight beside it with it, so each of them runs once more, alone; the one that
    fails again comes with its error in place of an output.
    """
    started: deque[tuple[Tag, Array, Handle]] = deque()

    def alone(tag: Tag, batch: Array) -> tuple[Tag, Array | UserError]:
        try:
            return tag, backend.run(batch)
        except UserError as error:
            return tag, error

    def drain(limit: int) -> Iterator[tuple[Tag, Array | UserError]]:
        while len(started) > limit:
            tag, batch, wait = started.popleft()
            try:
                output = wait()
            except UserError:
                failed = [(tag, batch), *((other, waiting) for other, waiting, _ in started)]
                started.clear()
                yield from (alone(*one) for one in failed)
            else:
                yield tag, output

    for tag, batch in batches:
        try:
            handle = backend.submit(batch)
        except UserError:
            yield from drain(0)
            yield alone(tag, batch)
            continue
        started.append((tag, batch, handle))
        yield from drain(backend.in_flight - 1)
    yield from drain(0)


def check_output(output: Array, card: ModelCard, images: int, size: tuple[int, int] | None = None) -> Array:
    """`output` itself if it fits the card; raises `UserError` where file and card disagree.

    Args:
        output: what the network returned.
        card: the model's.
        images: number of images in the batch.
        size: (height, width) of the network's input; None leaves the output's unchecked.
    """
    rank = len(card.output.shape)
    if output.ndim != rank or output.shape[0] != images:
        raise UserError(
            f"the network returned {card.output.name} of shape {output.shape} for {images} images, "
            f"expected {rank} dimensions as its model card says; export the model again"
        )
    if size is not None:
        expected = size if card.emits_labels else (len(card.classes), size[0] // 4, size[1] // 4)
        if output.shape[1:] != expected:
            raise UserError(
                f"the network returned {card.output.name} of shape {output.shape} for an input of {size[0]}x{size[1]}, "
                f"expected {(images, *expected)}; export the model again"
            )
    return np.asarray(output)


def input_size(batch: Array, card: ModelCard) -> tuple[int, int]:
    """(height, width) of a batch."""
    return (batch.shape[1], batch.shape[2]) if card.takes_uint8 else (batch.shape[2], batch.shape[3])

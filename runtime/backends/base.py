# SPDX-License-Identifier: Apache-2.0
"""What a backend is: a loaded network that runs batches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError

if TYPE_CHECKING:
    from internimage_deploy.runtime.gpu.device import DeviceArray

Tag = TypeVar("Tag")
Handle = Callable[[], npt.NDArray[Any]]
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
    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The network's output for `batch`: input as `card.input` says, output as `card.output` says.

        Calls may come from several threads. Raises `UserError` where the machine is too small for the batch.
        """

    def submit(self, batch: npt.NDArray[Any]) -> Handle:
        """Start a batch and return the function that waits for its output. Raises like `run`."""
        output = self.run(batch)
        return lambda: output

    def run_on_device(self, batch: Any) -> DeviceArray:
        """Run a GPU array (PyTorch, CuPy, ...); the output stays on the GPU.

        Raises:
            UserError: this backend does not run on a GPU, or the array does not fit the model.
        """
        raise UserError(f"the backend {self.name} takes NumPy arrays only; run an engine to keep arrays on the GPU")

    def measure(self, batch: npt.NDArray[Any]) -> dict[str, float]:
        """Run a batch and time its parts: milliseconds by part, at least "run"."""
        start = time.perf_counter()
        self.run(batch)
        return {"run": 1e3 * (time.perf_counter() - start)}

    def close(self) -> None:  # noqa: B027 - most backends have nothing to free
        """Free the network; it is not used afterwards."""


def run_each(
    backend: Backend, batches: Iterable[tuple[Tag, npt.NDArray[Any]]]
) -> Iterator[tuple[Tag, npt.NDArray[Any] | UserError]]:
    """(tag, output) for each (tag, batch), in order; as many batches are in flight as the backend likes.

    A batch that fails takes those in flight beside it with it, so each of them runs once more, alone; the one that
    fails again comes with its error in place of an output.
    """
    started: deque[tuple[Tag, npt.NDArray[Any], Handle]] = deque()

    def alone(tag: Tag, batch: npt.NDArray[Any]) -> tuple[Tag, npt.NDArray[Any] | UserError]:
        try:
            return tag, backend.run(batch)
        except UserError as error:
            return tag, error

    def drain(most: int) -> Iterator[tuple[Tag, npt.NDArray[Any] | UserError]]:
        while len(started) > most:
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


def check_output(output: npt.NDArray[Any], card: ModelCard, images: int) -> npt.NDArray[Any]:
    """`output` itself if its rank and batch fit the card; raises `UserError` where file and card disagree."""
    rank = len(card.output.shape)
    if output.ndim != rank or output.shape[0] != images:
        raise UserError(
            f"the network returned {card.output.name} of shape {output.shape} for {images} images, "
            f"expected {rank} dimensions as its model card says; export the model again"
        )
    return np.asarray(output)


def first_line(error: BaseException) -> str:
    """What a runtime's many-lined exception says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

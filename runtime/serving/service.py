# SPDX-License-Identifier: Apache-2.0
"""From an image to its labels: room, decoding, deadline, timings; no HTTP."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.runtime.imaging.results import png
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.serving.admission import MemoryBudget, RateLimiter, Share
from internimage_deploy.runtime.serving.execution.executor import Executor
from internimage_deploy.runtime.serving.http import image_codec
from internimage_deploy.runtime.serving.http_error import HttpError, overloaded
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

_ARRIVAL_S = 1.0  # how long a request that is still being sent keeps its place


@dataclass
class SegmentedImage:
    """An image with its labels, the seconds each stage took, and the number of images in its batch."""

    segmentation: Segmentation
    seconds: dict[str, float]
    batch: int


class Service:
    """Everything between HTTP and the executor.

    The service decides how many images are in work at once (`Settings.capacity`). An image takes a place from the
    start of its decoding to its labels, and a request takes one while its body is read, so that no client sends an
    image that could only be turned away afterwards. Nothing behind the service turns images away for lack of room.

    Args:
        settings: limits and model.
        executor: runs the network.
        metrics: counts what happens.
    """

    def __init__(self, settings: Settings, executor: Executor, metrics: Metrics) -> None:
        self.settings = settings
        self.executor = executor
        self.metrics = metrics
        self.memory = MemoryBudget(settings.limits.memory)
        self.rate = RateLimiter(settings.limits.rate, settings.limits.burst)
        self.closing = False
        # A server that counts its connections replaces these.
        self.connections: Callable[[], int] = lambda: 0
        self.connections_from: Callable[[str], int] = lambda _address: 0
        self._max_pixels = settings.model.options.max_pixels
        self._pipeline: ImagePipeline | None = None
        self._threads = ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="images")
        self._places_taken = 0
        metrics.memory.set_function(lambda: self.memory.used)

    async def start(self) -> None:
        """Load the model. Raises `UserError` if it cannot be loaded."""
        card = await self.executor.start()
        options = self.settings.model.options
        pipeline = ImagePipeline(card, resize=options.resize, window=options.window, max_pixels=options.max_pixels)
        await self.in_thread(_warm_up, pipeline)
        self._pipeline = pipeline

    async def close(self) -> None:
        """Finish what was accepted and free everything."""
        self.closing = True
        await self.executor.close()
        self._threads.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """True while images can be segmented."""
        return self._pipeline is not None and not self.closing and self.executor.alive()

    @property
    def card(self) -> ModelCard:
        """The loaded model's card. Raises `HttpError` 503 while there is none."""
        return self._loaded().card

    def check_connections(self, peer: str) -> None:
        """Raise `HttpError` 503 when too many connections are open, in all or from the address `peer`."""
        limits = self.settings.limits
        if self.connections() > limits.connections:
            reason = "too many connections; try again"
        elif self.connections_from(peer) >= limits.connections_per_client and not limits.is_proxy(peer):
            reason = "too many connections from this address; try again"
        else:
            return
        error = overloaded(reason, kind="connections")
        error.headers["Connection"] = "close"
        raise error

    def check_room(self) -> None:
        """Raise `HttpError` 503 while no image can be accepted: not loaded, shutting down, every place taken."""
        self._loaded()
        if self.closing:
            raise overloaded("the service is shutting down; try again", kind="closing")
        if self._places_taken >= self.settings.capacity:
            raise overloaded(
                "too many images are waiting already; try again", retry_after_s=self.executor.retry_after_s()
            )

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Hold a place while a request's body is read. Raises `HttpError` 503 if there is none.

        When many requests come at once, those without a chance get their 503 before they send. A slow sender loses
        its place after a second, so that holding all of them takes as many requests as using them would.
        """
        with self._place() as release:
            lapse = asyncio.get_running_loop().call_later(_ARRIVAL_S, release)
            try:
                yield
            finally:
                lapse.cancel()

    async def segment_file(self, data: bytes, share: Share) -> SegmentedImage:
        """Segment an encoded image. Raises `HttpError` 400, 413, 422 (not for this model), 503."""
        return await self._segment(lambda: self._decode(data, share))

    async def segment_array(self, image: npt.NDArray[np.uint8]) -> SegmentedImage:
        """Segment an image (H, W, 3) uint8 RGB. Raises `HttpError` 422 (not for this model), 503."""
        return await self._segment(lambda: image)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)` beside the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _segment(self, decode: Callable[[], npt.NDArray[np.uint8]]) -> SegmentedImage:
        pipeline = self._loaded()
        deadline = time.monotonic() + self.settings.limits.deadline_s
        with self._place():
            started = time.monotonic()
            prepared = await self.in_thread(lambda: pipeline.prepare(decode()))
            decoded = time.monotonic()
            try:
                labels, timing = await self.executor.segment(prepared.for_network(), deadline)
            except UserError as error:
                raise HttpError(422, str(error), kind="model") from error
        seconds = {"decode": decoded - started, "queue": timing.queue_s, "run": timing.run_s}
        for stage, value in seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(value)
        self.metrics.images.inc()
        return SegmentedImage(pipeline.result(prepared, labels), seconds, timing.batch)

    def _decode(self, data: bytes, share: Share) -> npt.NDArray[np.uint8]:
        width, height = image_codec.checked_size(data, self._max_pixels)
        share.take(3 * width * height)
        return image_codec.decode(data, self._max_pixels)

    def _loaded(self) -> ImagePipeline:
        if self._pipeline is None:
            raise overloaded("the model is loading; try again", kind="loading", retry_after_s=2)
        return self._pipeline

    @contextmanager
    def _place(self) -> Iterator[Callable[[], None]]:
        """Take a place until the block ends, or until the function it gets is called. Raises `HttpError` 503."""
        self.check_room()
        self._places_taken += 1
        held = True

        def release() -> None:
            nonlocal held
            self._places_taken -= held
            held = False

        try:
            yield release
        finally:
            release()


def _warm_up(pipeline: ImagePipeline) -> None:
    """Load what decoding and encoding load on first use, so that the first client does not wait for it."""
    black = png(np.zeros((8, 8, 3), np.uint8))
    pipeline.prepare(image_codec.decode(black, 64))

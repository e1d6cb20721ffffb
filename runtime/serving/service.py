# SPDX-License-Identifier: Apache-2.0
"""A picture in, its labels out: decoding, room, deadlines, timings; no HTTP."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.serving.admission import MemoryBudget, RateLimiter, Share
from internimage_deploy.runtime.serving.execution.executor import Engine
from internimage_deploy.runtime.serving.http import image_codec as pictures
from internimage_deploy.runtime.serving.http_error import Refusal, overloaded
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Settings

T = TypeVar("T")

_ARRIVAL_S = 1.0  # how long a request that is still being sent keeps its place


@dataclass
class Answer:
    """A picture's labels, and the seconds each stage took."""

    result: Segmentation
    seconds: dict[str, float]
    batch: int


class Service:
    """Everything between HTTP and the engine.

    Args:
        settings: limits and model.
        engine: runs the network.
        metrics: counts what happens.
    """

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.memory = MemoryBudget(settings.limits.memory)
        self.rate = RateLimiter(settings.limits.rate, settings.limits.burst)
        self.closing = False
        self.connections: Callable[[], int] = lambda: 0  # a server that counts them says how many are open
        self._pipeline: ImagePipeline | None = None
        self._threads = ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="pictures")
        self._taken = 0
        self._arriving = 0
        metrics.memory.set_function(lambda: self.memory.used)

    async def start(self) -> None:
        """Load the model. Raises `UserError` if it cannot be loaded."""
        card = await self.engine.start()
        options = self.settings.model.options
        pipeline = ImagePipeline(
            card, resize=options.resize, window=options.window, max_pixels=self.settings.limits.pixels
        )
        await self.in_thread(_warm_up, pipeline)
        self._pipeline = pipeline

    async def close(self) -> None:
        """Finish what was accepted and free everything."""
        self.closing = True
        await self.engine.close()
        self._threads.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """True while pictures can be answered."""
        return self._pipeline is not None and not self.closing and self.engine.alive()

    @property
    def card(self) -> ModelCard:
        """The loaded model's card; refuses with 503 while there is none."""
        return self._loaded().card

    def check_crowd(self) -> None:
        """Refuse with 503 when too many connections are open."""
        if self.connections() > self.settings.limits.connections:
            refusal = overloaded("too many connections; try again", kind="connections")
            refusal.headers["Connection"] = "close"
            raise refusal

    def check_room(self) -> None:
        """Refuse with 503 at once what would be refused later: not loaded, shutting down, queue full."""
        self._loaded()
        if self.closing:
            raise overloaded("the service is shutting down; try again", kind="closing")
        if self._taken + self._arriving >= self.settings.places:
            raise self.engine.refusal()

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Hold a place while a request's body is read; refuses with 503 if there is none.

        When many requests come at once, those without a chance hear of it before they send. A slow sender's place is
        given up after a second, so that holding all of them takes as many requests as using them would.
        """
        self.check_room()
        self._arriving += 1
        held = True

        def give_back() -> None:
            nonlocal held
            self._arriving -= held
            held = False

        lapse = asyncio.get_running_loop().call_later(_ARRIVAL_S, give_back)
        try:
            yield
        finally:
            lapse.cancel()
            give_back()

    async def segment_file(self, data: bytes, share: Share) -> Answer:
        """Labels of an encoded picture. Refuses with 400, 413, 422 (not for this model), 503."""
        return await self._segment(lambda: self._decode(data, share))

    async def segment_array(self, image: npt.NDArray[np.uint8]) -> Answer:
        """Labels of a picture (H, W, 3) uint8 RGB. Refuses with 422 (not for this model), 503."""
        return await self._segment(lambda: image)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _segment(self, picture: Callable[[], npt.NDArray[np.uint8]]) -> Answer:
        pipeline = self._loaded()
        deadline = time.monotonic() + self.settings.limits.deadline_s
        with self._place():
            started = time.monotonic()
            prepared = await self.in_thread(lambda: pipeline.prepare(picture()))
            decoded = time.monotonic()
            try:
                labels, timing = await self.engine.segment(prepared.for_network(), deadline)
            except UserError as error:
                raise Refusal(422, str(error), kind="model") from error
        seconds = {"decode": decoded - started, "queue": timing.queue_s, "run": timing.run_s}
        for stage, value in seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(value)
        self.metrics.pictures.inc()
        return Answer(pipeline.result(prepared, labels), seconds, timing.batch)

    def _decode(self, data: bytes, share: Share) -> npt.NDArray[np.uint8]:
        width, height = pictures.picture_size(data, self.settings.limits.pixels)
        share.take(3 * width * height)
        return pictures.decode(data, self.settings.limits.pixels)

    def _loaded(self) -> ImagePipeline:
        if self._pipeline is None:
            raise overloaded("the model is loading; try again", kind="loading", retry_after_s=2)
        return self._pipeline

    @contextmanager
    def _place(self) -> Iterator[None]:
        self.check_room()
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


def _warm_up(pipeline: ImagePipeline) -> None:
    """Load what decoding and encoding load on first use, so that the first client does not wait for it."""
    black = pictures.png(np.zeros((8, 8, 3), np.uint8))
    pipeline.prepare(pictures.decode(black, 64))

# SPDX-License-Identifier: Apache-2.0
"""Where the network runs, as the application sees it; and the engine of one machine."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from internimage_deploy.card import ModelCard
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution.batcher import Batcher, Timing
from internimage_deploy.runtime.serving.execution.pool import Pool
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Settings

log = logging.getLogger("internimage_deploy.serving")

_CLOSE_S = 60


class Engine(Protocol):
    """Runs the network somewhere."""

    async def start(self) -> ModelCard:
        """Load the model and wait until it answers. Raises `UserError` if it cannot be loaded."""
        ...

    def refusal(self) -> Refusal:
        """The 503 for a picture that there is no room for, saying when to come back."""
        ...

    def alive(self) -> bool:
        """True while something can answer."""
        ...

    async def segment(self, image: NetworkImage, deadline: float) -> tuple[Labels, Timing]:
        """Labels at the picture's own size. Raises `Refusal` if there is no room or no time."""
        ...

    async def close(self) -> None:
        """Finish accepted work, then free everything."""
        ...


class LocalEngine:
    """Worker processes on this machine behind one queue; see `Engine`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._pool = Pool(
            settings.model,
            count=settings.workers,
            batch=settings.batching.size,
            run_s=settings.run_s,
            restarted=metrics.worker_restarts.inc,
        )
        self._batcher: Batcher[NetworkImage, Labels] = Batcher(
            self._pool.run,
            size=settings.batching.size,
            delay_s=settings.batching.delay_s,
            # What the application lets in is never refused here: its picture has been sent and decoded already.
            queue=settings.places,
            runners=settings.workers,
            observe=metrics.batch_size.observe,
        )
        metrics.queue.set_function(lambda: self._batcher.waiting)
        metrics.workers.set_function(lambda: self._pool.alive)

    async def start(self) -> ModelCard:
        return await self._pool.start()

    def refusal(self) -> Refusal:
        return self._batcher.refusal()

    def alive(self) -> bool:
        return self._pool.alive > 0

    async def segment(self, image: NetworkImage, deadline: float) -> tuple[Labels, Timing]:
        return await self._batcher.submit(image, key=image.size, deadline=deadline)

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._batcher.close(), timeout=_CLOSE_S)
        except asyncio.TimeoutError:
            log.warning("gave up on pictures that were still running after %d s", _CLOSE_S)
        finally:
            await self._pool.close()

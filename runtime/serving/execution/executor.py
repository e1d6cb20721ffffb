# SPDX-License-Identifier: Apache-2.0
"""The executor, which runs the network for the application; here on this machine, in worker processes."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from internimage_deploy.card import ModelCard
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution.batcher import Batcher, Timing
from internimage_deploy.runtime.serving.execution.pool import Pool
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Settings

log = logging.getLogger("internimage_deploy.serving")

# Whoever waits for images has got a response before the executor is closed; what still runs then, runs for nobody.
_CLOSE_S = 1.0
_CROP_COST = 1 << 16  # of an image, or of each of its crops, beside the pixels; in pixels


class Executor(Protocol):
    """Runs the network somewhere. The caller limits how many images are in work (`Service`)."""

    async def start(self) -> ModelCard:
        """Load the model and wait until it can run. Raises `UserError` if it cannot be loaded."""
        ...

    def retry_after_s(self) -> int:
        """Seconds after which there should be room again, if every place is taken now."""
        ...

    def alive(self) -> bool:
        """True while at least one copy of the model can run."""
        ...

    async def segment(self, image: NetworkImage, deadline: float, client: str) -> tuple[Labels, Timing]:
        """Labels (H, W) at the image's own size.

        Args:
            image: at network scale.
            deadline: on `time.monotonic`'s clock; an image without labels is given up then.
            client: whose image it is, so that clients can take turns.

        Raises:
            HttpError: 503, the image was not done in time, or the workers with it were lost.
            UserError: the model cannot take this image.
        """
        ...

    async def close(self) -> None:
        """Finish accepted images, then free everything."""
        ...


class LocalExecutor:
    """Worker processes on this machine behind one queue; see `Executor`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._pool = Pool(
            settings.model,
            count=settings.workers,
            # By then the deadline of every image in the batch has passed, and nobody waits for it any more.
            run_s=min(settings.run_s, settings.limits.deadline_s),
            on_restart=metrics.worker_restarts.inc,
        )
        self._batcher: Batcher[NetworkImage, Labels] = Batcher(
            self._pool.run,
            size=settings.model.options.batch,
            delay_s=settings.batching.delay_s,
            weight=lambda image: image.crop_count,
            runners=settings.workers,
            on_batch=metrics.batch_size.observe,
        )
        metrics.queue.set_function(lambda: self._batcher.waiting)
        metrics.workers.set_function(lambda: self._pool.alive)

    async def start(self) -> ModelCard:
        return await self._pool.start()

    def retry_after_s(self) -> int:
        return self._batcher.retry_after_s()

    def alive(self) -> bool:
        return self._pool.alive > 0

    async def segment(self, image: NetworkImage, deadline: float, client: str) -> tuple[Labels, Timing]:
        height, width = image.size
        cost = image.crop_count * _CROP_COST + height * width
        return await self._batcher.submit(image, key=image.size, deadline=deadline, client=client, cost=cost)

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._batcher.close(), timeout=_CLOSE_S)
        except asyncio.TimeoutError:
            log.warning("gave up on images that were still running")
        finally:
            await self._pool.close()

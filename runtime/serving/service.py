# SPDX-License-Identifier: Apache-2.0
"""From an image to its labels: room, memory, decoding, deadline, timings; no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard, label_dtype
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.runtime.imaging.results import png
from internimage_deploy.runtime.imaging.segmentation import Segmentation
from internimage_deploy.runtime.serving.admission import CLIENT_PART, MemoryBudget, RateLimiter, Share
from internimage_deploy.runtime.serving.execution.decoder import DecoderPool, Job
from internimage_deploy.runtime.serving.execution.executor import Executor
from internimage_deploy.runtime.serving.execution.memory import return_freed_memory
from internimage_deploy.runtime.serving.http import image_codec, inference_protocol
from internimage_deploy.runtime.serving.http_error import HttpError, overloaded
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Settings

T = TypeVar("T")

_ARRIVAL_S = 1.0  # how long a request that is still being sent keeps its place
_LARGE_WORK = 4_000_000  # pixels; images of more have threads and processes of their own, so that others never wait
_MOST_DECODERS = 8  # beyond these, decoding is not what limits a service
_IMAGE_BYTES = 3  # per pixel
# Bytes per pixel and byte of a label: in the worker, in the pipe, here, and where an encoder copies them.
_LABEL_COPIES = 4
# Per pixel at network scale: the image, its copy in the pipe, and at the other end.
_NETWORK_BYTES = 12
_SHORT_JSON, _LARGE_JSON = 64 << 10, 1 << 20
_LARGE_NICENESS = 5
_WARM_UP_S = 120.0

RESULT_BYTES = 4
"""Bytes per pixel that encoding labels takes: a copy of them, and a file of their size at worst."""
OVERLAY_BYTES = 16
"""As `RESULT_BYTES`, for an overlay: the colours, the blend, its copy in BGR, the file and its copy."""


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
    Places and memory are shared between clients (`CLIENT_PART`), which take turns in all that follows.

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
        cores = max(os.cpu_count() or 1, 2)
        self._decoders = DecoderPool(min(cores, _MOST_DECODERS) + 1)
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="images")
        self._threads_large = ThreadPoolExecutor(cores, thread_name_prefix="large", initializer=_lower_priority)
        self._places: Counter[str] = Counter()  # taken, by client
        metrics.memory.set_function(lambda: self.memory.used)

    async def start(self) -> None:
        """Load the model. Raises `UserError` if it cannot be loaded."""
        return_freed_memory()
        self._decoders.start()
        card = await self.executor.start()
        options = self.settings.model.options
        pipeline = ImagePipeline(card, resize=options.resize, window=options.window, max_pixels=options.max_pixels)
        await self._warm_up(pipeline)
        self._pipeline = pipeline

    async def close(self) -> None:
        """Finish what was accepted and free everything."""
        self.closing = True
        self._decoders.close()
        await self.executor.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._threads_large.shutdown(wait=False, cancel_futures=True)

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

    def check_room(self, client: str) -> None:
        """Raise `HttpError` 503 while no image of `client` can be accepted: not loaded, shutting down, no place."""
        self._loaded()
        if self.closing:
            raise overloaded("the service is shutting down; try again", kind="closing")
        free = self.settings.capacity - self._places.total()
        if free <= 0 or self._places[client] > CLIENT_PART * free:
            whose = "images" if free <= 0 else "of your images"
            raise overloaded(
                f"too many {whose} are waiting already; try again", retry_after_s=self.executor.retry_after_s()
            )

    @contextmanager
    def arriving(self, client: str) -> Iterator[None]:
        """Hold a place while the body of a request of `client` is read. Raises `HttpError` 503 if there is none.

        When many requests come at once, those without a chance get their 503 before they send. A slow sender loses
        its place after a second, so that holding all of them takes as many requests as using them would.
        """
        with self._place(client) as release:
            lapse = asyncio.get_running_loop().call_later(_ARRIVAL_S, release)
            try:
                yield
            finally:
                lapse.cancel()

    async def segment_file(
        self, data: bytes | bytearray, share: Share, result_bytes: int = RESULT_BYTES
    ) -> SegmentedImage:
        """Segment an encoded image.

        Args:
            data: the image file.
            share: takes the memory that the image needs, until its response has been sent.
            result_bytes: per pixel, of what will be made of the labels; see `RESULT_BYTES`.

        Raises:
            HttpError: 400, 413, 422 (not for this model), 503.
        """

        async def decode(deadline: float) -> npt.NDArray[np.uint8]:
            structure = await self.in_thread(
                lambda: image_codec.checked_structure(data, self._max_pixels), large=len(data) > _LARGE_WORK
            )
            pixels = structure.width * structure.height
            memory = structure.bytes_per_pixel * pixels + 2 * len(data)
            share.take(self._memory(structure.height, structure.width, memory, result_bytes))
            cost = min(structure.work, self._max_pixels) + len(data)
            large = structure.work > _LARGE_WORK or len(data) > _LARGE_WORK
            job = Job(data, pixels, memory, large, deadline, client=share.client, cost=cost)
            return await self._decoders.decode(job)

        return await self._segment(decode, share.client)

    async def segment_array(self, image: npt.NDArray[np.uint8], share: Share) -> SegmentedImage:
        """Segment an image (H, W, 3) uint8 RGB, whose own memory `share` holds. Raises `HttpError` 422, 503."""

        async def take(_deadline: float) -> npt.NDArray[np.uint8]:
            share.take(self._memory(image.shape[0], image.shape[1], decoding=0, result_bytes=0))
            return image

        return await self._segment(take, share.client)

    async def read_request(
        self, body: bytearray, header_length: str | None, share: Share
    ) -> inference_protocol.InferRequest:
        """As `inference_protocol.read_request`; much JSON is read beside this process, which could do nothing else."""
        limits = self.settings.limits
        text = len(body)
        if header_length is not None:
            text = int(header_length) if header_length.isdecimal() and len(header_length) < 12 else 0
        if text <= _SHORT_JSON or text > inference_protocol.MAX_JSON:
            share.take(inference_protocol.JSON_MEMORY * min(text, _SHORT_JSON))
            read = inference_protocol.read_request
            return read(body, header_length, max_images=limits.batch_images, max_pixels=self._max_pixels)
        memory = inference_protocol.JSON_MEMORY * text + len(body)
        share.take(memory)
        deadline = time.monotonic() + limits.deadline_s
        arguments: dict[str, object] = {
            "header_length": header_length,
            "max_images": limits.batch_images,
            "max_pixels": self._max_pixels,
        }
        large = text > _LARGE_JSON
        job = Job(body, self._max_pixels, memory, large, deadline, arguments, client=share.client, cost=len(body))
        return await self._decoders.read_request(job)

    async def in_thread(self, function: Callable[[], T], *, large: bool = False) -> T:
        """The result of `function` beside the event loop; `large` ones do not keep others waiting."""
        threads = self._threads_large if large else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def _segment(
        self, decode: Callable[[float], Awaitable[npt.NDArray[np.uint8]]], client: str
    ) -> SegmentedImage:
        pipeline = self._loaded()
        deadline = time.monotonic() + self.settings.limits.deadline_s
        with self._place(client):
            started = time.monotonic()
            image = await decode(deadline)
            try:
                prepared = await self.in_thread(lambda: pipeline.prepare(image), large=is_large(image))
                decoded = time.monotonic()
                labels, timing = await self.executor.segment(prepared.for_network(), deadline, client)
            except UserError as error:
                raise HttpError(422, str(error), kind="model") from error
        seconds = {"decode": decoded - started, "queue": timing.queue_s, "run": timing.run_s}
        for stage, value in seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(value)
        self.metrics.images.inc()
        return SegmentedImage(pipeline.result(prepared, labels), seconds, timing.batch)

    def _memory(self, height: int, width: int, decoding: int, result_bytes: int) -> int:
        """Bytes that an image takes at most: while it is decoded, while the network has it, while it is encoded."""
        if not (height and width):  # not known, and so refused by the decoder
            return decoding
        pixels = height * width
        label_bytes = label_dtype(len(self.card.classes))().itemsize
        pipeline = self._loaded()
        network_height, network_width = pipeline.geometry((height, width)).network
        running = network_height * network_width * _NETWORK_BYTES + pixels * _LABEL_COPIES * label_bytes
        running += pipeline.crop_bytes((height, width))
        encoding = pixels * (label_bytes + result_bytes)
        return pixels * _IMAGE_BYTES + max(decoding, running, encoding)

    async def _warm_up(self, pipeline: ImagePipeline) -> None:
        """Load what decoding and encoding load on first use, so that the first client does not wait for it."""
        black = np.zeros((8, 8, 3), np.uint8)
        await self.in_thread(lambda: (png(black), pipeline.prepare(black)))
        far = time.monotonic() + _WARM_UP_S
        try:
            await self._decoders.decode(Job(png(black), 64, 1 << 20, large=False, deadline=far))
        except HttpError as error:
            raise UserError(f"the processes that decode images do not work: {error.reason}") from error

    def _loaded(self) -> ImagePipeline:
        if self._pipeline is None:
            raise overloaded("the model is loading; try again", kind="loading", retry_after_s=2)
        return self._pipeline

    @contextmanager
    def _place(self, client: str) -> Iterator[Callable[[], None]]:
        """Take a place until the block ends, or until the function it gets is called. Raises `HttpError` 503."""
        self.check_room(client)
        self._places[client] += 1
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._places[client] -= 1
                if not self._places[client]:
                    del self._places[client]

        try:
            yield release
        finally:
            release()


def is_large(image: npt.NDArray[np.generic]) -> bool:
    """True for an image, or labels, (H, W, ...) whose work must not keep others waiting."""
    return image.shape[0] * image.shape[1] > _LARGE_WORK


def _lower_priority() -> None:
    """On Linux a thread has a priority of its own; large images take what the others leave."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.nice(_LARGE_NICENESS)

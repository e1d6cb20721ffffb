# SPDX-License-Identifier: Apache-2.0
"""The pool of worker processes: starts them, hands them batches, replaces those that die or hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution import worker as worker_process
from internimage_deploy.runtime.serving.http_error import overloaded
from internimage_deploy.runtime.serving.settings import ModelSettings

log = logging.getLogger("internimage_deploy.serving")

T = TypeVar("T")

_SHORT_LIFE_S = 5.0  # a worker that dies sooner is replaced after a pause that grows
_LONGEST_PAUSE_S = 30.0


class WorkerLost(Exception):
    """The worker died before it returned labels."""


class WorkerHung(WorkerLost):
    """The worker returned nothing in the time that a batch may take, and was killed."""


class Worker:
    """One worker process and the connection to it."""

    def __init__(self, model: ModelSettings) -> None:
        # spawn: a forked copy of a process with threads may hang, and CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, worker_end = context.Pipe()
        self._process = context.Process(target=worker_process.main, args=(worker_end, model), daemon=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._process.start()
        worker_end.close()
        self.started = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.is_alive()

    async def wait_loaded(self) -> ModelCard:
        """Wait until the model is loaded. Raises `UserError` with the worker's reason, or `WorkerLost`."""
        message = await self._in_thread(self._receive_first)
        if isinstance(message, worker_process.LoadFailed):
            raise UserError(message.reason)
        return message.card

    async def run(self, images: list[NetworkImage], timeout_s: float) -> list[Labels | Exception]:
        """Run one batch; see `worker.main`. Raises `WorkerLost`, after `timeout_s` seconds at the latest."""
        return await self._in_thread(lambda: self._exchange(images, timeout_s))

    async def wait_ended(self) -> None:
        """Return when the process has ended."""
        while self._process.is_alive():
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(Exception):
            self._process.kill()

    async def close(self) -> None:
        """Let the process end by itself; kill it if it does not."""
        self._connection.close()
        for _ in range(50):
            if not self._process.is_alive():
                break
            await asyncio.sleep(0.02)
        else:
            self.kill()
        self._thread.shutdown(wait=False)

    def discard(self) -> None:
        """Free what belonged to a dead worker."""
        self._connection.close()
        self._process.join(1)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _exchange(self, images: list[NetworkImage], timeout_s: float) -> list[Labels | Exception]:
        give_up = time.monotonic() + timeout_s
        # A process that does not read blocks the send in a full pipe; only its end frees it.
        watchdog = threading.Timer(timeout_s, self.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self._connection.send(images)
            if self._connection.poll(max(give_up - time.monotonic(), 0)):
                results: list[Labels | Exception] = self._connection.recv()
                return results
        except (EOFError, OSError) as error:
            if time.monotonic() < give_up:
                raise WorkerLost("the worker ended") from error
        finally:
            watchdog.cancel()
        self.kill()
        raise WorkerHung(f"the worker returned nothing in {timeout_s:g} s")

    def _receive_first(self) -> worker_process.Loaded | worker_process.LoadFailed:
        try:
            message: worker_process.Loaded | worker_process.LoadFailed = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost("the worker ended") from error
        return message


class Pool:
    """Keeps `count` workers alive and hands them batches.

    Args:
        model: what every worker loads.
        count: number of worker processes.
        run_s: after so many seconds in one batch a worker counts as hung and is replaced.
        on_restart: called each time a worker is replaced.
    """

    def __init__(
        self,
        model: ModelSettings,
        *,
        count: int,
        run_s: float,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._count = count
        self._run_s = run_s
        self._on_restart = on_restart
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._supervisors: list[asyncio.Task[None]] = []
        self._first_card: asyncio.Future[ModelCard] | None = None

    @property
    def alive(self) -> int:
        """Number of workers that have loaded the model and run."""
        return sum(worker.alive for worker in self._workers)

    async def start(self) -> ModelCard:
        """Start all workers; returns when the first is ready. Raises `UserError` if the model cannot be loaded."""
        self._first_card = asyncio.get_running_loop().create_future()
        self._supervisors = [asyncio.create_task(self._supervise(self._first_card)) for _ in range(self._count)]
        return await self._first_card

    async def run(self, images: Sequence[NetworkImage]) -> list[Labels | Exception]:
        """Labels of `images`, in order, or why there are none.

        Images that a dying worker held run once more, each alone, so that an image which kills workers takes no other
        with it. An image that is lost twice gets an `HttpError` 503, and so do all of a batch that took too long.
        """
        try:
            return await self._run_once(list(images))
        except WorkerHung as hung:
            log.warning("a worker was replaced: %s", hung)
            return [overloaded(f"{hung}; try again", kind="worker", retry_after_s=2) for _ in images]
        except WorkerLost as lost:
            log.warning("a worker was lost with %d images (%s); they run again", len(images), lost)
        results: list[Labels | Exception] = []
        for image in images:
            try:
                results += await self._run_once([image])
            except WorkerLost as lost:
                results.append(overloaded(f"lost twice: {lost}", kind="worker", retry_after_s=2))
        return results

    async def close(self) -> None:
        """End all workers."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers.clear()

    async def _run_once(self, images: list[NetworkImage]) -> list[Labels | Exception]:
        worker = await self._next_idle()
        try:
            results = await worker.run(images, self._run_s)
        except WorkerLost:
            worker.kill()
            raise
        self._idle.put_nowait(worker)
        return results

    async def _next_idle(self) -> Worker:
        give_up = time.monotonic() + self._run_s
        while True:
            try:
                worker = await asyncio.wait_for(self._idle.get(), max(give_up - time.monotonic(), 0.01))
            except asyncio.TimeoutError as error:
                raise WorkerLost("no worker is running") from error
            if worker.alive:
                return worker

    async def _supervise(self, first_card: asyncio.Future[ModelCard]) -> None:
        """Keep one worker alive; ends only if the pool's first worker cannot load the model."""
        pause_s = 0.0
        while True:
            worker = Worker(self._model)
            try:
                card = await worker.wait_loaded()
            except (UserError, WorkerLost) as error:
                worker.kill()
                worker.discard()
                if not first_card.done():
                    lost = UserError(f"the worker ended while loading {self._model.path}; it may be short of memory")
                    first_card.set_exception(error if isinstance(error, UserError) else lost)
                    return
                log.error("a worker could not start again: %s", error)
            except asyncio.CancelledError:
                worker.kill()
                worker.discard()
                raise
            else:
                self._workers.add(worker)
                self._idle.put_nowait(worker)
                if not first_card.done():
                    first_card.set_result(card)
                await worker.wait_ended()
                self._workers.discard(worker)
                worker.discard()
            self._on_restart()
            short = time.monotonic() - worker.started < _SHORT_LIFE_S
            pause_s = min(max(pause_s * 2, 0.5), _LONGEST_PAUSE_S) if short else 0.0
            log.warning("worker %s ended; starting another%s", worker.pid, f" in {pause_s:g} s" if pause_s else "")
            await asyncio.sleep(pause_s)

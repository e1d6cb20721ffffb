# SPDX-License-Identifier: Apache-2.0
"""The worker processes: started, watched, replaced when they die, and asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution import worker as worker_process
from internimage_deploy.runtime.serving.http_error import overloaded
from internimage_deploy.runtime.serving.settings import ModelSettings

log = logging.getLogger("internimage_deploy.serving")

_SHORT_LIFE_S = 5.0  # a worker that dies sooner is replaced after a pause that grows
_LONGEST_PAUSE_S = 30.0


class WorkerLost(Exception):
    """The worker died, or hung and was ended, before it answered."""


class Worker:
    """One process and the connection to it."""

    def __init__(self, model: ModelSettings, batch: int) -> None:
        # spawn: a forked copy of a process with threads may hang, and CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker_process.main, args=(theirs, model, batch), daemon=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._process.start()
        theirs.close()
        self.started = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.is_alive()

    async def ready(self) -> ModelCard:
        """Wait until the model is loaded. Raises `UserError` with the worker's reason, or `WorkerLost`."""
        kind, value = await self._in_thread(self._receive)
        if kind == "refused":
            raise UserError(value)
        assert isinstance(value, ModelCard)
        return value

    async def ask(self, items: list[NetworkImage], timeout_s: float) -> list[Labels | Exception]:
        """The worker's answers. Raises `WorkerLost`."""
        answers: list[Labels | Exception] = await self._in_thread(self._exchange, items, timeout_s)
        return answers

    async def died(self) -> None:
        """Return when the process has ended."""
        while self._process.is_alive():
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(Exception):
            self._process.kill()

    async def close(self) -> None:
        """Let the process end by itself, then insist."""
        self._connection.close()
        for _ in range(100):
            if not self._process.is_alive():
                break
            await asyncio.sleep(0.02)
        else:
            self.kill()
        self._thread.shutdown(wait=False)

    def discard(self) -> None:
        """Free what a dead worker leaves."""
        self._connection.close()
        self._process.join(1)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _exchange(self, items: list[NetworkImage], timeout_s: float) -> Any:
        give_up = time.monotonic() + timeout_s
        # A process that does not read blocks the send in a full pipe; only its end frees it.
        watchdog = threading.Timer(timeout_s, self.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self._connection.send(items)
            if self._connection.poll(max(give_up - time.monotonic(), 0)):
                return self._connection.recv()
        except (EOFError, OSError) as error:
            if time.monotonic() < give_up:
                raise WorkerLost("the worker ended") from error
        finally:
            watchdog.cancel()
        self.kill()
        raise WorkerLost(f"no answer in {timeout_s:g} s")

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost("the worker ended") from error


class Pool:
    """Keeps `count` workers alive and hands them batches.

    Args:
        model: what every worker loads.
        count: processes.
        batch: most pictures in one run of the network.
        run_s: after so many seconds without an answer a worker counts as hung and is replaced.
        restarted: called each time a worker is replaced.
    """

    def __init__(
        self,
        model: ModelSettings,
        *,
        count: int,
        batch: int,
        run_s: float,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._count = count
        self._batch = batch
        self._run_s = run_s
        self._restarted = restarted
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._supervisors: list[asyncio.Task[None]] = []
        self._first: asyncio.Future[ModelCard] | None = None

    @property
    def alive(self) -> int:
        """Workers that have loaded the model and run."""
        return sum(worker.alive for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the loaded workers."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def start(self) -> ModelCard:
        """Start all workers; returns when the first is ready. Raises `UserError` if the model cannot be loaded."""
        self._first = asyncio.get_running_loop().create_future()
        self._supervisors = [asyncio.create_task(self._supervise()) for _ in range(self._count)]
        return await self._first

    async def run(self, items: Sequence[NetworkImage]) -> list[Labels | Exception]:
        """Answers to `items`, in order.

        Work that a dying worker held runs once more, each picture alone, so that a picture which kills workers takes
        no other with it. What is lost twice is answered with 503.
        """
        try:
            return await self._once(list(items))
        except WorkerLost as lost:
            log.warning("worker lost with %d pictures (%s); they run again", len(items), lost)
        answers: list[Labels | Exception] = []
        for item in items:
            try:
                answers += await self._once([item])
            except WorkerLost as lost:
                answers.append(overloaded(f"lost twice: {lost}", kind="worker", retry_after_s=2))
        return answers

    async def close(self) -> None:
        """End all workers."""
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers.clear()

    async def _once(self, items: list[NetworkImage]) -> list[Labels | Exception]:
        worker = await self._take()
        try:
            answers = await worker.ask(items, self._run_s)
        except WorkerLost:
            worker.kill()
            raise
        self._idle.put_nowait(worker)
        return answers

    async def _take(self) -> Worker:
        give_up = time.monotonic() + self._run_s
        while True:
            try:
                worker = await asyncio.wait_for(self._idle.get(), max(give_up - time.monotonic(), 0.01))
            except asyncio.TimeoutError as error:
                raise WorkerLost("no worker is running") from error
            if worker.alive:
                return worker

    async def _supervise(self) -> None:
        assert self._first is not None
        pause_s = 0.0
        while True:
            worker = Worker(self._model, self._batch)
            try:
                card = await worker.ready()
            except (UserError, WorkerLost) as error:
                worker.kill()
                worker.discard()
                if not self._first.done():
                    lost = UserError(f"the worker ended while loading {self._model.path}; it may be short of memory")
                    self._first.set_exception(error if isinstance(error, UserError) else lost)
                    return
                log.error("a worker could not start again: %s", error)
            except asyncio.CancelledError:
                worker.kill()
                worker.discard()
                raise
            else:
                self._workers.add(worker)
                self._idle.put_nowait(worker)
                if not self._first.done():
                    self._first.set_result(card)
                await worker.died()
                self._workers.discard(worker)
                worker.discard()
            self._restarted()
            short = time.monotonic() - worker.started < _SHORT_LIFE_S
            pause_s = min(max(pause_s * 2, 0.5), _LONGEST_PAUSE_S) if short else 0.0
            log.warning("worker %s ended; starting another%s", worker.pid, f" in {pause_s:g} s" if pause_s else "")
            await asyncio.sleep(pause_s)

# SPDX-License-Identifier: Apache-2.0
"""Pictures of many requests, run together: a bounded queue, one group for each network size, deadlines.

A batch starts when it is full or its first picture has waited long enough, and a runner is free. While every runner is
busy the groups grow, so batches are large exactly when the load is high.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from internimage_deploy.runtime.serving.http_error import Refusal, overloaded

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass
class Timing:
    """Seconds a picture spent, and how many pictures ran with it."""

    queue_s: float = 0.0
    run_s: float = 0.0
    batch: int = 0


@dataclass(eq=False)
class _Job(Generic[In, Out]):
    item: In
    key: Hashable
    deadline: float
    answer: asyncio.Future[Out]
    arrived: float
    timing: Timing = field(default_factory=Timing)


class Batcher(Generic[In, Out]):
    """Collects items into batches of one key.

    Args:
        run: takes the items of one batch, returns as many answers; an answer that is an exception goes to its caller,
            an exception that is raised goes to every caller of the batch.
        size: most items in a batch.
        delay_s: how long the first item of a batch waits for others, in seconds.
        queue: most items that wait; more are refused with 503.
        runners: batches that may run at once.
        observe: called with every batch's size.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out | Exception]]],
        *,
        size: int,
        delay_s: float,
        queue: int,
        runners: int = 1,
        observe: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self._run = run
        self._size = max(size, 1)
        self._delay_s = delay_s
        self._limit = queue
        self._free = runners
        self._observe = observe
        self._groups: dict[Hashable, deque[_Job[In, Out]]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._recent_run_s = 0.1
        self._closed = False
        self.waiting = 0

    @property
    def full(self) -> bool:
        """True when `submit` would refuse."""
        return self.waiting >= self._limit

    def refusal(self) -> Refusal:
        """The 503 for a full queue, with the time after which it should have room."""
        seconds = self.waiting / self._size * self._recent_run_s
        return overloaded(
            f"{self.waiting} pictures are waiting already; try again",
            retry_after_s=min(int(seconds) + 1, 60),
        )

    async def submit(self, item: In, *, key: Hashable, deadline: float) -> tuple[Out, Timing]:
        """The answer to `item`.

        Args:
            item: what `run` gets.
            key: only items of one key run together.
            deadline: on `time.monotonic`'s clock; an item that still waits then is refused.

        Raises:
            Refusal: 503 for a full queue, a passed deadline, or while closing.
        """
        if self._closed:
            raise overloaded("the service is shutting down; try again", kind="closing")
        if self.full:
            raise self.refusal()
        answer: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        job = _Job(item, key, deadline, answer, time.monotonic())
        self._groups.setdefault(key, deque()).append(job)
        self.waiting += 1
        self._dispatch()
        try:
            return await answer, job.timing
        finally:
            self._forget(job)

    async def close(self) -> None:
        """Take nothing new, finish what waits and runs."""
        self._closed = True
        self._dispatch()
        while self.waiting or self._running:
            await asyncio.sleep(0.01)
        if self._timer is not None:
            self._timer.cancel()

    def _forget(self, job: _Job[In, Out]) -> None:
        """Take a job whose caller went away out of the queue; does nothing if it left the queue already."""
        group = self._groups.get(job.key)
        if group is not None and job in group:
            group.remove(job)
            self.waiting -= 1
            if not group:
                del self._groups[job.key]

    def _dispatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        self._expire(now)
        while self._free and self._groups:
            # Of the groups that may start, the one whose first picture has waited longest.
            due = [
                group
                for group in self._groups.values()
                if len(group) >= self._size or self._closed or now - group[0].arrived >= self._delay_s
            ]
            if not due:
                break
            self._start(min(due, key=lambda group: group[0].arrived), now)
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        if not self._groups:
            return
        wake = min(min(job.deadline for job in group) for group in self._groups.values())
        if self._free:
            wake = min(wake, min(group[0].arrived + self._delay_s for group in self._groups.values()))
        self._timer = asyncio.get_running_loop().call_later(max(wake - now, 0) + 1e-4, self._dispatch)

    def _expire(self, now: float) -> None:
        late = [job for group in self._groups.values() for job in group if job.deadline <= now]
        for job in late:
            self._forget(job)
            if not job.answer.done():
                waited = f"waited {now - job.arrived:.1f} s without a turn; try again"
                job.answer.set_exception(overloaded(waited, kind="deadline", retry_after_s=2))

    def _start(self, group: deque[_Job[In, Out]], now: float) -> None:
        batch = [group.popleft() for _ in range(min(len(group), self._size))]
        self.waiting -= len(batch)
        if not group:
            del self._groups[batch[0].key]
        batch = [job for job in batch if not job.answer.done()]
        if not batch:
            return
        for job in batch:
            job.timing.queue_s = now - job.arrived
            job.timing.batch = len(batch)
        self._free -= 1
        task = asyncio.get_running_loop().create_task(self._run_batch(batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run_batch(self, batch: list[_Job[In, Out]]) -> None:
        self._observe(len(batch))
        started = time.monotonic()
        try:
            answers = await self._run([job.item for job in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} pictures")
        except Exception as error:
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)
        else:
            run_s = time.monotonic() - started
            self._recent_run_s += 0.2 * (run_s - self._recent_run_s)
            for job, answer in zip(batch, answers, strict=True):
                job.timing.run_s = run_s
                if job.answer.done():
                    continue
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)
        finally:
            self._free += 1
            self._dispatch()

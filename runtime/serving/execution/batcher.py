# SPDX-License-Identifier: Apache-2.0
"""Batches of images from different requests: one queue for each network size, a delay to fill batches, deadlines.

A batch starts when it is full or its first image has waited long enough, and a runner is free. While every runner is
busy the queues grow, so batches are large exactly when the load is high; clients take turns then. How many images may
wait is the caller's decision.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from internimage_deploy.runtime.serving.execution.turns import Turns
from internimage_deploy.runtime.serving.http_error import overloaded

In = TypeVar("In")
Out = TypeVar("Out")

_LONGEST_RETRY_S = 60


@dataclass
class Timing:
    """Seconds an image waited and ran, and the number of images in its batch."""

    queue_s: float = 0.0
    run_s: float = 0.0
    batch: int = 0


@dataclass(eq=False)
class _Entry(Generic[In, Out]):
    """An item, and the future of its output."""

    item: In
    key: Hashable
    client: str
    cost: float
    due: float  # see `Turns`
    deadline: float
    output: asyncio.Future[Out]
    arrived: float
    timing: Timing = field(default_factory=Timing)


class Batcher(Generic[In, Out]):
    """Collects items into batches of one key.

    Args:
        run: runs one batch and returns an output for each item; an output that is an exception is raised to the
            caller of that item, an exception that `run` raises is raised to every caller of the batch.
        size: maximum batch size.
        weight: what an item counts for in a batch, the same for items of one key; an item of more than `size` runs
            alone.
        delay_s: how long the first item of a batch waits for others, in seconds.
        runners: batches that may run at once.
        on_batch: called with every batch's size.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out | Exception]]],
        *,
        size: int,
        delay_s: float,
        weight: Callable[[In], int] = lambda _item: 1,
        runners: int = 1,
        on_batch: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self._run = run
        self._size = max(size, 1)
        self._weight = weight
        self._delay_s = delay_s
        self._free_runners = runners
        self._on_batch = on_batch
        self._queues: dict[Hashable, deque[_Entry[In, Out]]] = {}  # by arrival
        self._turns = Turns()
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._recent_run_s = 0.1
        self._closed = False
        self.waiting = 0

    @property
    def running(self) -> int:
        """Number of batches that run."""
        return len(self._running)

    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, in which the items that wait now should have started."""
        batches = sum(len(queue) / self._items_in_batch(queue) for queue in self._queues.values())
        return min(int(batches * self._recent_run_s) + 1, _LONGEST_RETRY_S)

    async def submit(
        self, item: In, *, key: Hashable, deadline: float, client: str = "", cost: float = 1.0
    ) -> tuple[Out, Timing]:
        """The output of `item`, and its timing.

        Args:
            item: an item of the list that `run` gets.
            key: only items of one key run together.
            deadline: on `time.monotonic`'s clock; an item that still waits then is given up, and of one that runs
                the output is no longer waited for.
            client: whose item it is; clients with waiting items take turns.
            cost: what running the item takes, in any unit.

        Raises:
            HttpError: 503, the deadline has passed, or the batcher is closing.
        """
        if self._closed:
            raise overloaded("the service is shutting down; try again", kind="closing")
        output: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        due = self._turns.due(client, cost)
        entry = _Entry(item, key, client, cost, due, deadline, output, time.monotonic())
        self._queues.setdefault(key, deque()).append(entry)
        self.waiting += 1
        self._dispatch()
        late = asyncio.get_running_loop().call_later(max(deadline - entry.arrived, 0) + 1e-3, self._give_up, entry)
        try:
            return await output, entry.timing
        finally:
            late.cancel()
            self._remove(entry)

    async def close(self) -> None:
        """Accept nothing new; finish what waits and runs."""
        self._closed = True
        self._dispatch()
        while self.waiting or self._running:
            await asyncio.sleep(0.01)
        if self._timer is not None:
            self._timer.cancel()

    def _items_in_batch(self, queue: deque[_Entry[In, Out]]) -> int:
        """Maximum number of items of a queue that run together."""
        return max(self._size // self._weight(queue[0].item), 1)

    def _remove(self, entry: _Entry[In, Out]) -> None:
        """Take an entry out of its queue, because its caller went away; nothing if it has left the queue already."""
        queue = self._queues.get(entry.key)
        if queue is not None and entry in queue:
            queue.remove(entry)
            self._turns.cancel(entry.client, entry.cost)
            self.waiting -= 1
            if not queue:
                del self._queues[entry.key]

    def _dispatch(self) -> None:
        """Start every batch that is due, and set the timer for the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        self._expire(now)
        while self._free_runners and self._queues:
            due = [
                queue
                for queue in self._queues.values()
                if len(queue) >= self._items_in_batch(queue) or self._closed or now - queue[0].arrived >= self._delay_s
            ]
            if not due:
                break
            self._start(min(due, key=lambda queue: min((entry.due, entry.arrived) for entry in queue)), now)
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        if not self._queues:
            return
        wake = min(min(entry.deadline for entry in queue) for queue in self._queues.values())
        if self._free_runners:
            wake = min(wake, min(queue[0].arrived + self._delay_s for queue in self._queues.values()))
        self._timer = asyncio.get_running_loop().call_later(max(wake - now, 0) + 1e-4, self._dispatch)

    def _give_up(self, entry: _Entry[In, Out]) -> None:
        """End the wait for an item that still runs at its deadline; the run goes on, others may wait for it."""
        if not entry.output.done():
            took = f"not done after {time.monotonic() - entry.arrived:.1f} s; try again"
            entry.output.set_exception(overloaded(took, kind="deadline", retry_after_s=2))

    def _expire(self, now: float) -> None:
        late = [entry for queue in self._queues.values() for entry in queue if entry.deadline <= now]
        for entry in late:
            self._remove(entry)
            if not entry.output.done():
                waited = f"waited {now - entry.arrived:.1f} s without a turn; try again"
                entry.output.set_exception(overloaded(waited, kind="deadline", retry_after_s=2))

    def _start(self, queue: deque[_Entry[In, Out]], now: float) -> None:
        batch = sorted(queue, key=lambda entry: (entry.due, entry.arrived))[: self._items_in_batch(queue)]
        for entry in batch:
            queue.remove(entry)
            self._turns.serve(entry.due)
        self.waiting -= len(batch)
        if not queue:
            del self._queues[batch[0].key]
        batch = [entry for entry in batch if not entry.output.done()]
        if not batch:
            return
        for entry in batch:
            entry.timing.queue_s = now - entry.arrived
            entry.timing.batch = len(batch)
        self._free_runners -= 1
        task = asyncio.get_running_loop().create_task(self._run_batch(batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run_batch(self, batch: list[_Entry[In, Out]]) -> None:
        self._on_batch(len(batch))
        started = time.monotonic()
        try:
            outputs = await self._run([entry.item for entry in batch])
            if len(outputs) != len(batch):
                raise RuntimeError(f"got {len(outputs)} outputs for {len(batch)} items")
        except Exception as error:
            for entry in batch:
                if not entry.output.done():
                    entry.output.set_exception(error)
        else:
            run_s = time.monotonic() - started
            self._recent_run_s += 0.2 * (run_s - self._recent_run_s)
            for entry, output in zip(batch, outputs, strict=True):
                entry.timing.run_s = run_s
                if entry.output.done():
                    continue
                if isinstance(output, Exception):
                    entry.output.set_exception(output)
                else:
                    entry.output.set_result(output)
        finally:
            self._free_runners += 1
            self._dispatch()

# SPDX-License-Identifier: Apache-2.0
"""Which execution context runs a batch, and what belongs to which thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from internimage_deploy.card import Array
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.gpu.device import DeviceError
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext

Value = TypeVar("Value")


class ContextPool:
    """Execution contexts, of which `in_flight` run batches at a time; any thread may start a batch or wait for one.

    A batch runs on a context that has its shape already, so that each shape of a few keeps its CUDA graph; else on a
    new one, up to `limit`; else on the one that has not run for longest. The device's context must be current.
    """

    def __init__(
        self, create: Callable[[], ExecutionContext], *, in_flight: int, limit: int, has_room: Callable[[], bool]
    ) -> None:
        """Make an empty pool.

        Args:
            create: makes a context; raises `UserError` where the GPU's memory does not hold one more.
            in_flight: number of batches that run at a time.
            limit: number of contexts, at least `in_flight`.
            has_room: whether the GPU has memory to spare for contexts beyond `in_flight`.
        """
        self._create, self._has_room = create, has_room
        self._in_flight, self._limit = in_flight, limit
        self._contexts: list[ExecutionContext] = []  # the latest used last
        self._running: dict[int, ExecutionContext] = {}  # by batch number, the longest running first
        self._outputs: dict[int, Array] = {}  # finished batches that nobody has waited for yet, by number
        self._next = 0
        self._lock = threading.Lock()

    def start(self, batch: Array, profile: int) -> int:
        """Start a batch; returns the number to call `finish` with."""
        with self._lock:
            if len(self._running) == self._in_flight:
                self._collect(next(iter(self._running)))
            context = self._context(batch.shape)
            context.start(batch, profile)
            number = self._next
            self._next += 1
            self._running[number] = context
            return number

    def finish(self, number: int) -> Array:
        """Wait for a batch and return its output. Raises `DeviceError` if the pool was closed before."""
        with self._lock:
            if number in self._running:
                self._collect(number)
            if number not in self._outputs:
                raise DeviceError("the batch was lost when another one failed on the GPU")
            return self._outputs.pop(number)

    @contextlib.contextmanager
    def idle(self, shape: tuple[int, ...]) -> Iterator[ExecutionContext]:
        """A context for a batch of this shape, for the duration of a `with` block, in which no other batch runs."""
        with self._lock:
            for number in list(self._running):
                self._collect(number)
            yield self._context(shape)

    def close(self) -> None:
        """Free the contexts' memory; batches that run are lost. The pool can be used again, as after a failure."""
        with self._lock:
            contexts, self._contexts = self._contexts, []
            self._running.clear()
            for context in contexts:
                context.close()

    def _context(self, shape: tuple[int, ...]) -> ExecutionContext:
        """An idle context for a batch of this shape."""
        idle = [context for context in self._contexts if context not in self._running.values()]
        chosen = next((context for context in idle if context.shape == shape), None)
        if chosen is None:
            chosen = self._new_context()
        if chosen is None:
            if not idle:
                number = next(iter(self._running))
                idle = [self._running[number]]
                self._collect(number)
            chosen = idle[0]
        self._contexts = [*(context for context in self._contexts if context is not chosen), chosen]
        return chosen

    def _new_context(self) -> ExecutionContext | None:
        """One more context, or None where there are enough or the GPU's memory does not hold one more."""
        count = len(self._contexts)
        if count >= self._limit or (count >= self._in_flight and not self._has_room()):
            return None
        try:
            return self._create()
        except UserError:
            if not count:
                raise
            self._limit = count
            return None

    def _collect(self, number: int) -> None:
        self._outputs[number] = self._running.pop(number).finish()


class PerThread(Generic[Value]):
    """One object per thread, made on first use."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._local = threading.local()
        self._all: list[Value] = []
        self._lock = threading.Lock()

    def get(self) -> Value:
        """This thread's object."""
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
            with self._lock:
                self._all.append(self._local.value)
        value: Value = self._local.value
        return value

    def clear(self) -> list[Value]:
        """Forget the objects of all threads and return them."""
        with self._lock:
            values, self._all = self._all, []
        self._local = threading.local()
        return values

# SPDX-License-Identifier: Apache-2.0
"""Admission of requests: the bearer token, the rate per client, and each client's part of places and memory."""

from __future__ import annotations

import hmac
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from internimage_deploy.runtime.serving.http_error import HttpError, overloaded

CLIENT_PART = 3
"""A client gets more of what all share while it holds at most so many times what is left free.

However much clients want, something is left for the next: one alone can hold three quarters, two can hold three
sevenths each, and so on.
"""
_CLIENTS_REMEMBERED = 10_000
_LONGEST_WAIT_S = 86400  # what a client is told at most, at the tiniest rate


def check_token(expected: str, authorization: str | None) -> None:
    """Check that the Authorization header is `Bearer <expected>`; an empty `expected` accepts every request.

    The comparison takes the same time wherever the first difference lies.

    Raises:
        HttpError: 401, the header is missing or wrong.
    """
    if not expected:
        return
    scheme, _, token = (authorization or "").partition(" ")
    same = hmac.compare_digest(token.strip(" \t").encode("utf-8", "surrogateescape"), expected.encode())
    if not (same and scheme.lower() == "bearer"):
        raise HttpError(
            401,
            "this service requires a token: send the header  Authorization: Bearer TOKEN",
            kind="token",
            headers={"WWW-Authenticate": "Bearer"},
        )


class RateLimiter:
    """A token bucket for each client.

    Args:
        rate: requests per second; 0 switches the limiter off.
        burst: requests a client may send at once.
        clock: returns seconds, monotonic.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = float(max(burst, 1))
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, when counted)

    def check(self, client: str) -> None:
        """Count a request of `client`. Raises `HttpError` 429 when it has sent too many."""
        if self._rate <= 0:
            return
        now = self._clock()
        tokens, counted = self._buckets.pop(client, (self._burst, now))
        tokens = min(tokens + (now - counted) * self._rate, self._burst)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _CLIENTS_REMEMBERED:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = math.ceil(min((1 - tokens) / self._rate, _LONGEST_WAIT_S))
            raise HttpError(
                429,
                f"more than {self._rate:g} requests per second; try again in {wait} s",
                kind="rate",
                headers={"Retry-After": str(max(wait, 1))},
            )


class MemoryBudget:
    """A limit on the bytes that all requests together hold, and that those of one client hold; see `CLIENT_PART`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._lock = threading.Lock()  # images are decoded in threads
        self._clients: Counter[str] = Counter()
        self.used = 0

    def share(self, client: str = "") -> Share:
        """The part of the budget that one request of `client` holds; use it in a `with` block."""
        return Share(self, client)


class Share:
    """The bytes of a `MemoryBudget` that one request of `client` holds; released when the block ends."""

    def __init__(self, budget: MemoryBudget, client: str) -> None:
        self.client = client
        self._budget = budget
        self._held = 0
        self._closed = False

    def take(self, size: int) -> None:
        """Hold `size` bytes more.

        Raises:
            HttpError: 503 while other requests hold too much of the budget, 413 if even all of it were too little.
        """
        budget = self._budget
        if self._held + size > budget._total:
            raise HttpError(413, "the request needs more memory than this service allows", kind="size")
        with budget._lock:
            free = budget._total - budget.used - size
            if self._closed or free < 0:
                raise overloaded("too many large images at the moment; try again", kind="memory")
            of_client = budget._clients[self.client]
            if of_client > self._held and of_client + size > CLIENT_PART * free:  # one request alone may have it all
                raise overloaded("too many of your large images at the moment; try again", kind="memory")
            self._add(size)

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give everything back; nothing can be taken any more."""
        with self._budget._lock:
            self._add(-self._held)
            self._closed = True

    def _add(self, size: int) -> None:
        self._held += size
        self._budget.used += size
        self._budget._clients[self.client] += size
        if not self._budget._clients[self.client]:
            del self._budget._clients[self.client]

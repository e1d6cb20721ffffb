# SPDX-License-Identifier: Apache-2.0
"""Who may come in: bearer token, rate per client, memory of all requests together."""

from __future__ import annotations

import hmac
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from internimage_deploy.runtime.serving.http_error import Refusal, overloaded

_CLIENTS_REMEMBERED = 10_000


def check_token(expected: str, authorization: str | None) -> None:
    """Refuse with 401 unless `authorization` is `Bearer <expected>`; an empty `expected` lets everyone in.

    The comparison takes the same time wherever the first difference lies.
    """
    if not expected:
        return
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected.encode())
    if not (same and scheme.lower() == "bearer"):
        raise Refusal(
            401,
            "this service asks for a token: send the header  Authorization: Bearer TOKEN",
            kind="token",
            headers={"WWW-Authenticate": "Bearer"},
        )


class RateLimiter:
    """A token bucket for each client address.

    Args:
        rate: requests per second; 0 switches the limiter off.
        burst: requests that may come at once.
        clock: seconds that only grow.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = float(max(burst, 1))
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, when counted)

    def check(self, client: str) -> None:
        """Count a request of `client`; refuses with 429 when it has sent too many."""
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
            wait = math.ceil((1 - tokens) / self._rate)
            raise Refusal(
                429,
                f"more than {self._rate:g} requests per second; try again in {wait} s",
                kind="rate",
                headers={"Retry-After": str(max(wait, 1))},
            )


class MemoryBudget:
    """Bytes that all requests together may hold."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._lock = threading.Lock()  # pictures are decoded in threads
        self.used = 0

    def share(self) -> Share:
        """A request's part of the budget; use it in a `with` block."""
        return Share(self)


class Share:
    """What one request holds of a `MemoryBudget`; given back when the block ends."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._held = 0
        self._closed = False

    def take(self, size: int) -> None:
        """Hold `size` bytes more; refuses with 503 if the budget is used up, with 413 if it could never hold them."""
        if self._held + size > self._budget._total:
            raise Refusal(413, "the request needs more memory than this service allows", kind="size")
        with self._budget._lock:
            if self._closed or self._budget.used + size > self._budget._total:
                raise overloaded("too many large pictures at the moment; try again", kind="memory")
            self._budget.used += size
            self._held += size

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        with self._budget._lock:
            self._budget.used -= self._held
            self._held = 0
            self._closed = True

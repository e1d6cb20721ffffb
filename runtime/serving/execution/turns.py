# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: clients that wait for one resource get equal parts of it, however many requests each sends.

Start-time fair queueing (Goyal, Vin, Cheng, 1996): a request is due when its client's earlier ones are paid for, or now
if the client has none. What is served are the requests that are due first, and now is when the last of them was due. So
a client with one request waits for about one request of each other client, and none waits for ever.
"""

from __future__ import annotations

_CLIENTS_REMEMBERED = 10_000


class Turns:
    """Gives each request the time at which it is due, in units of cost; serve the earliest first."""

    def __init__(self) -> None:
        self._now = 0.0
        self._paid: dict[str, float] = {}  # when each client's requests are paid for

    def due(self, client: str, cost: float) -> float:
        """When a request of `client` is due that takes `cost` of the resource."""
        due = max(self._now, self._paid.pop(client, 0.0))
        self._paid[client] = due + cost
        if len(self._paid) > _CLIENTS_REMEMBERED:
            del self._paid[next(iter(self._paid))]
        return due

    def serve(self, due: float) -> None:
        """Note that a request gets its turn."""
        self._now = max(self._now, due)

    def cancel(self, client: str, cost: float) -> None:
        """Note that a request will not be served: its client need not pay for it."""
        if client in self._paid:
            self._paid[client] -= cost

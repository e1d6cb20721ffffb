# SPDX-License-Identifier: Apache-2.0
"""The one way in which a request is refused."""

from __future__ import annotations


class Refusal(Exception):
    """An answer other than success: HTTP status, a reason for people, extra headers, a short word for the metrics."""

    def __init__(self, status: int, reason: str, *, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.kind = kind
        self.headers = headers or {}


def overloaded(reason: str, *, kind: str = "overload", retry_after_s: int = 1) -> Refusal:
    """503 that tells the client when to come back."""
    return Refusal(503, reason, kind=kind, headers={"Retry-After": str(max(retry_after_s, 1))})

# SPDX-License-Identifier: Apache-2.0
"""The exception that becomes an HTTP error response."""

from __future__ import annotations


class HttpError(Exception):
    """A request ends with an error response.

    Args:
        status: HTTP status, 400 or above.
        reason: the message in the response's JSON, for people.
        kind: one word for the metric `internimage_refused_total`.
        headers: extra headers of the response.
    """

    def __init__(self, status: int, reason: str, *, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.kind = kind
        self.headers = headers or {}


def overloaded(reason: str, *, kind: str = "overload", retry_after_s: int = 1) -> HttpError:
    """A 503 whose Retry-After header tells the client when to send the request again."""
    return HttpError(503, reason, kind=kind, headers={"Retry-After": str(max(retry_after_s, 1))})

# SPDX-License-Identifier: Apache-2.0
"""The gateway: what happens to every request before its route, and to every response."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internimage_deploy.runtime.serving.admission import check_token
from internimage_deploy.runtime.serving.http_error import HttpError, overloaded
from internimage_deploy.runtime.serving.settings import Limits, client_of, parse_address

if TYPE_CHECKING:
    from internimage_deploy.runtime.serving.service import Service

# What a load balancer or a browser must reach without a token. The page's own requests carry one.
_PUBLIC = frozenset(
    {"/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
)
# Their requests get their 503 here already: under overload most requests end so, and the work of routing them would
# take time from those that are accepted. The place itself is taken by the route (`Service.arriving`).
_SEGMENT = frozenset({"/v1/segment", "/v1/segment/batch"})
# Some proxies append the port: 192.0.2.1:4711, [2001:db8::1]:4711.
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d+)?|([\d.]+):\d+")
_MOST_PROXIES = 32  # in a row
_SKIPPED_BODY = 256 << 10
_LONGEST_QUERY = 1000  # bytes; the longest that means anything has 40, and reading 30,000 parameters takes 0.3 s


class GatewayMiddleware:
    """Checks connections, rate, token and room, counts and times requests, and sets security headers of responses."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        path = scope["path"]
        status = 500
        started_response = False
        body_left = _announced_body(scope)

        async def receive_counted() -> Message:
            nonlocal body_left
            message = await receive()
            if message["type"] == "http.request":
                body_left = body_left - len(message.get("body", b"")) if message.get("more_body") else 0
            return message

        async def send_hardened(message: Message) -> None:
            nonlocal status, started_response
            if message["type"] == "http.response.start":
                started_response = True
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if body_left > _SKIPPED_BODY:  # the server would read all of it to find the next request
                    headers["Connection"] = "close"
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            if len(scope["query_string"]) > _LONGEST_QUERY:
                raise HttpError(414, f"the query is longer than {_LONGEST_QUERY} bytes", kind="size")
            if path not in _PUBLIC:
                peer = scope["client"][0] if scope.get("client") else ""
                self._service.check_connections(peer)
                client = self._check_client(scope, peer)
                if path in _SEGMENT and scope["method"] == "POST":
                    self._service.check_room(client)
            await self._app(scope, receive_counted, send_hardened)
        except HttpError as error:
            self._service.metrics.refused.labels(error.kind).inc()
            await _send_error(error, send_hardened)
        except asyncio.CancelledError:  # the server's, when the time to finish accepted requests is over
            if not started_response:
                await _send_error(overloaded("the service is shutting down; try again"), send_hardened)
        finally:
            # The route's pattern, not the path: the number of series must not be the client's choice.
            route = getattr(scope.get("route"), "path", path if path in _SEGMENT else "other")
            metrics = self._service.metrics
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    def _check_client(self, scope: Scope, peer: str) -> str:
        """The client, see `client_of`, which routes find in `request.state.client`. Raises `HttpError` 401, 429."""
        headers = Headers(scope=scope)
        limits = self._service.settings.limits
        forwarded = ",".join(headers.getlist("x-forwarded-for")) if limits.is_proxy(peer) else ""
        client = client_of(client_address(peer, forwarded, limits))
        scope.setdefault("state", {})["client"] = client
        self._service.rate.check(client)
        check_token(self._service.settings.token, headers.get("authorization"))
        return client


def client_address(peer: str, forwarded: str, limits: Limits) -> str:
    """The address of the client that sent a request.

    Args:
        peer: the address of the connection.
        forwarded: the X-Forwarded-For header, to which each proxy appends the address it was called from.
        limits: say which proxies are believed.

    Returns:
        The last address in the header that a trusted proxy appended and that is no trusted proxy itself; `peer` if
        that is no proxy, or the header is damaged there.
    """
    client = peer
    for entry in reversed(forwarded.rsplit(",", _MOST_PROXIES)[-_MOST_PROXIES:]):
        with_port = _WITH_PORT.fullmatch(entry.strip())
        address = parse_address((with_port[1] or with_port[2]) if with_port else entry.strip())
        if address is None or not limits.is_proxy(client):
            break
        client = str(address)
    return client


def _announced_body(scope: Scope) -> float:
    """Bytes of a request's body as its headers announce them; infinite for one that comes in chunks."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    return float(length) if length.isdecimal() else float("inf") if "transfer-encoding" in headers else 0.0


async def _send_error(error: HttpError, send: Send) -> None:
    body = json.dumps({"error": error.reason}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

# SPDX-License-Identifier: Apache-2.0
"""What happens to every request before its route and after its answer."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internimage_deploy.runtime.serving.admission import check_token
from internimage_deploy.runtime.serving.http_error import Refusal

if TYPE_CHECKING:
    from internimage_deploy.runtime.serving.service import Service

# What a load balancer or a browser must reach without a token. The page's own requests carry one.
_OPEN = frozenset(
    {"/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
)
# Requests refused here already when there is no room: under overload most requests end so, and they must not take the
# time of those that are answered.
_PICTURES = frozenset({"/v1/segment", "/v1/segment/batch"})


class Doorkeeper:
    """Asks for the token, counts requests of each client, refuses at once, measures, and hardens answers' headers."""

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

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            if path not in _OPEN:
                self._service.check_crowd()
                self._admit(scope)
            if path in _PICTURES and scope["method"] == "POST":
                self._service.check_room()
            await self._app(scope, receive, watch)
        except Refusal as refusal:
            self._service.metrics.refused.labels(refusal.kind).inc()
            await _refuse(refusal, watch)
        finally:
            # The route's pattern, not the path: the number of series must not be the client's choice.
            route = getattr(scope.get("route"), "path", path if path in _PICTURES else "other")
            metrics = self._service.metrics
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    def _admit(self, scope: Scope) -> None:
        client = scope.get("client")
        self._service.rate.check(client[0] if client else "")
        check_token(self._service.settings.token, Headers(scope=scope).get("authorization"))


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps({"error": refusal.reason}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

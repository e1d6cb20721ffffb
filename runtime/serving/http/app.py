# SPDX-License-Identifier: Apache-2.0
"""The HTTP application: routes, health, the page; the same on one machine and on Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from internimage_deploy._version import __version__
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.serving import metrics as metrics_module
from internimage_deploy.runtime.serving.execution.executor import Executor, LocalExecutor
from internimage_deploy.runtime.serving.http import api_schema
from internimage_deploy.runtime.serving.http.middleware import GatewayMiddleware
from internimage_deploy.runtime.serving.http.routes_segment import segment_routes
from internimage_deploy.runtime.serving.http.routes_v2 import protocol_routes
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.service import Service
from internimage_deploy.runtime.serving.settings import Settings

log = logging.getLogger("internimage_deploy.serving")

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# The page loads nothing from elsewhere and may not be framed; blob: is the image the user chose.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    settings: Settings,
    executor: Callable[[Settings, Metrics], Executor] = LocalExecutor,
    *,
    on_load_failure: Callable[[UserError], None] = lambda _error: None,
) -> FastAPI:
    """The application.

    Args:
        settings: model, limits, batching.
        executor: makes the executor that runs the network.
        on_load_failure: called when the model cannot be loaded; every request gets 503 then.
    """
    metrics = Metrics()
    service = Service(settings, executor(settings, metrics), metrics)

    async def load() -> None:
        try:
            await service.start()
            log.info("ready: %s", settings.name)
        except UserError as error:
            on_load_failure(error)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # Health can be asked while the model loads; `readyz` says when it is done.
        loading = asyncio.create_task(load())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await service.close()

    app = FastAPI(
        title="internimage-deploy",
        version=__version__,
        description="Semantic segmentation of images.",
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a redirect repeats the Host header, which is the client's choice
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(segment_routes(service))
    app.include_router(protocol_routes(service))
    _add_operations(app, service, metrics)
    _add_page(app)
    _add_errors(app)
    app.add_middleware(GatewayMiddleware, service=service)
    return app


def _add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["operations"], summary="Liveness of the process")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operations"],
        summary="Readiness of the model",
        responses=api_schema.UNREADY,
    )
    async def readyz() -> JSONResponse:
        return JSONResponse({"status": "ready" if service.ready else "not ready"}, 200 if service.ready else 503)

    for path, route in (("/healthz", healthz), ("/readyz", readyz)):
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics",
        tags=["operations"],
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=None, headers={"Content-Type": metrics_module.CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    folder = resources.files("internimage_deploy.runtime.serving.http") / "page"

    def add(path: str, content: bytes, content_type: str) -> None:
        async def read() -> Response:
            headers = {"Content-Type": content_type, "Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
            return Response(content, headers=headers)

        app.add_api_route(path, read, methods=["GET", "HEAD"], include_in_schema=False)

    for path, (name, content_type) in _PAGE.items():
        add(path, (folder / name).read_bytes(), content_type)


def _add_errors(app: FastAPI) -> None:
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HttpError)
        request.app.state.service.metrics.refused.labels(error.kind).inc()
        return JSONResponse({"error": error.reason}, error.status, error.headers)

    async def no_route(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        reasons = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
        return JSONResponse({"error": reasons}, 422)

    async def bug(_request: Request, _error: Exception) -> Response:
        return JSONResponse({"error": "internal error; the service's log has the details"}, 500)

    app.add_exception_handler(HttpError, http_error)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)

# SPDX-License-Identifier: Apache-2.0
"""The routes of the Open Inference Protocol, under /v2."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from internimage_deploy._version import __version__
from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http import api_schema
from internimage_deploy.runtime.serving.http import inference_protocol as protocol
from internimage_deploy.runtime.serving.http.body import read_body
from internimage_deploy.runtime.serving.http.responses import HeldResponse
from internimage_deploy.runtime.serving.http.routes_segment import all_of, until_gone
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.service import Service, is_large


def protocol_routes(service: Service) -> APIRouter:
    """The routes under /v2."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
    limits = service.settings.limits
    name = service.settings.name

    def check(model: str, version: str = protocol.VERSION) -> None:
        if model != name or version != protocol.VERSION:
            raise HttpError(404, f"this service has one model, '{name}', version {protocol.VERSION}", kind="model")

    @router.get("", summary="Server metadata")
    async def server() -> protocol.Json:
        return {"name": "internimage-deploy", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live", summary="Liveness of the process")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready", summary="Readiness of the model", responses=api_schema.UNREADY)
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @router.post("/repository/index", summary="The model of this service", responses=api_schema.ERRORS)
    async def index() -> list[dict[str, str]]:
        state = "READY" if service.ready else "UNAVAILABLE"
        return [{"name": name, "version": protocol.VERSION, "state": state, "reason": ""}]

    async def metadata(model: str, version: str = protocol.VERSION) -> protocol.Json:
        check(model, version)
        return protocol.model_metadata(name, service.card)

    async def config(model: str, version: str = protocol.VERSION) -> protocol.Json:
        check(model, version)
        return protocol.model_config(name, service.card)

    async def model_ready(model: str, version: str = protocol.VERSION) -> JSONResponse:
        check(model, version)
        return JSONResponse({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    async def infer(request: Request, model: str, version: str = protocol.VERSION) -> Response:
        check(model, version)
        with ExitStack() as held:
            share = held.enter_context(service.memory.share(request.state.client))
            infer_request = await read(request, share)
            share.take(infer_request.image.nbytes)
            images = await until_gone(
                request, all_of(service.segment_array(image, share) for image in infer_request.image)
            )
            share.take(protocol.response_memory(infer_request, images[0].segmentation.labels))
            labels = np.stack([image.segmentation.labels for image in images])
            content, headers, media_type = await service.in_thread(
                lambda: protocol.write_response(name, infer_request, labels), large=is_large(labels.reshape(-1, 1))
            )
            held.pop_all()  # the response gives its memory back
        return HeldResponse(content, share, headers=headers, media_type=media_type)

    async def read(request: Request, share: Share) -> protocol.InferRequest:
        with service.arriving(share.client):
            body = await read_body(request, share, limits)
        return await service.read_request(body, request.headers.get(protocol.HEADER_LENGTH), share)

    for prefix in ("/models/{model}", "/models/{model}/versions/{version}"):
        for path, route, summary in (
            ("", metadata, "Model metadata"),
            ("/config", config, "Model configuration"),
            ("/ready", model_ready, "Readiness of the model"),
        ):
            router.add_api_route(prefix + path, route, methods=["GET"], summary=summary, responses=api_schema.ERRORS)
        router.add_api_route(
            f"{prefix}/infer",
            infer,
            methods=["POST"],
            summary="Segment images given as a tensor",
            response_class=Response,
            responses=api_schema.INFER_RESPONSES,
            openapi_extra=api_schema.INFER_BODY,
        )
    return router

# SPDX-License-Identifier: Apache-2.0
"""`/v1/segment` and `/v1/segment/batch`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response

from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http import api_schema
from internimage_deploy.runtime.serving.http import responses as answers
from internimage_deploy.runtime.serving.http.body import Upload, read_body, read_uploads
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.service import Service

T = TypeVar("T")

View = Annotated[Literal["labels", "overlay"], Query(description="What a PNG answer shows.")]
Alpha = Annotated[float, Query(ge=0, le=1, description="Strength of the overlay's colours.")]


def segment_routes(service: Service) -> APIRouter:
    """The routes of this service's own interface."""
    router = APIRouter(prefix="/v1", tags=["segment"])
    limits = service.settings.limits

    @router.post(
        "/segment",
        summary="Segment one picture",
        description="PNG: 8-bit class ids at the picture's own size (16-bit above 256 classes), or the overlay. "
        "JSON: class shares, colours, and COCO's uncompressed run-length masks.",
        response_class=Response,
        responses=api_schema.SEGMENT_ANSWERS,
        openapi_extra=api_schema.PICTURE_BODY,
    )
    async def segment(request: Request, view: View = "labels", alpha: Alpha = 0.5) -> Response:
        kind = answers.negotiate(request.headers.get("accept"))
        with service.memory.share() as share:
            (upload,) = await _uploads(request, share, most=1)
            answer = await until_gone(request, service.segment_file(upload.data, share))
            started = time.monotonic()
            if kind == answers.PNG:
                content = await service.in_thread(answers.image, answer, view, alpha)
            else:
                content = await service.in_thread(
                    lambda: json.dumps(answers.facts(answer, service.settings.name)).encode()
                )
        answer.seconds["encode"] = time.monotonic() - started
        service.metrics.stage_seconds.labels("encode").observe(answer.seconds["encode"])
        return Response(
            content, media_type=kind, headers={"Server-Timing": answers.server_timing(answer), "Vary": "Accept"}
        )

    @router.post(
        "/segment/batch",
        summary="Segment several pictures",
        description=f"A form with up to {limits.batch_pictures} files. A picture that cannot be read is reported in "
        "its place; the request fails only if none can be read.",
        responses=api_schema.BATCH_ANSWERS,
        openapi_extra=api_schema.PICTURES_BODY,
        response_class=Response,
    )
    async def segment_batch(request: Request) -> Response:
        if not answers.accepts(request.headers.get("accept"), answers.JSON):
            raise Refusal(406, "a batch is answered as application/json", kind="accept")
        with service.memory.share() as share:
            uploads = await _uploads(request, share, most=limits.batch_pictures)
            places = asyncio.Semaphore(service.settings.batching.size)

            async def one(upload: Upload) -> dict[str, Any]:
                async with places:
                    return await _batch_entry(service, upload, share)

            entries = await until_gone(request, asyncio.gather(*(one(upload) for upload in uploads)))
            if all("error" in entry for entry in entries):
                raise Refusal(400, f"no picture could be read; the first: {entries[0]['error']}", kind="picture")
            content = await service.in_thread(lambda: json.dumps({"results": entries}).encode())
        return Response(content, media_type=answers.JSON)

    async def _uploads(request: Request, share: Share, most: int) -> list[Upload]:
        started = time.monotonic()
        with service.arriving():
            body = await read_body(request, share, limits)
        service.metrics.stage_seconds.labels("read").observe(time.monotonic() - started)
        uploads = await read_uploads(request, body, limits)
        if len(uploads) > most:
            raise Refusal(400, f"{len(uploads)} files; send several to /v1/segment/batch", kind="form")
        return uploads

    return router


async def _batch_entry(service: Service, upload: Upload, share: Share) -> dict[str, Any]:
    try:
        answer = await service.segment_file(upload.data, share)
        facts = await service.in_thread(answers.facts, answer, service.settings.name)
    except Refusal as refusal:
        if refusal.status == 503:  # not this picture's fault: the client should send all again
            raise
        return {"name": upload.name, "error": refusal.reason, "status": refusal.status}
    return {"name": upload.name, **facts}


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, given up as soon as the client goes away. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(400, "the client went away", kind="gone")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

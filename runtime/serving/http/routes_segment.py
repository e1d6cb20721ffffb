# SPDX-License-Identifier: Apache-2.0
"""The routes `/v1/segment` and `/v1/segment/batch`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from contextlib import ExitStack
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response

from internimage_deploy.runtime.imaging.results import Mask
from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http import api_schema, responses
from internimage_deploy.runtime.serving.http.body import Upload, read_body, read_uploads
from internimage_deploy.runtime.serving.http.json_writer import to_json
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.service import OVERLAY_BYTES, RESULT_BYTES, Service, is_large

T = TypeVar("T")

View = Annotated[Literal["labels", "overlay"], Query(description="What a PNG shows.")]
MaskKind = Annotated[
    Mask,
    Query(
        description="How a PNG holds the labels: `indexed`, a palette image of the class ids that viewers show in "
        "colours; `ids`, a grey image of the ids; `color`, an RGB image."
    ),
]
Alpha = Annotated[float, Query(ge=0, le=1, description="Strength of the overlay's colours.")]


def segment_routes(service: Service) -> APIRouter:
    """The routes of this service's own interface."""
    router = APIRouter(prefix="/v1", tags=["segment"])
    limits = service.settings.limits

    @router.post(
        "/segment",
        summary="Segment one image",
        description="PNG: 8-bit class ids at the image's own size (16-bit above 256 classes), or the overlay. "
        "JSON: class shares, colours, and COCO's uncompressed run-length masks.",
        response_class=Response,
        responses=api_schema.SEGMENT_RESPONSES,
        openapi_extra=api_schema.IMAGE_BODY,
    )
    async def segment(
        request: Request, view: View = "labels", alpha: Alpha = 0.5, mask: MaskKind = "indexed"
    ) -> Response:
        media_type = responses.negotiate(request.headers.get("accept"))
        colors = media_type == responses.PNG and (view == "overlay" or mask == "color")
        with ExitStack() as held:
            share = held.enter_context(service.memory.share(request.state.client))
            (upload,) = await _uploads(request, share, maximum=1)
            result_bytes = OVERLAY_BYTES if colors else RESULT_BYTES
            image = await until_gone(request, service.segment_file(upload.data, share, result_bytes))
            started = time.monotonic()
            large = is_large(image.segmentation.labels)
            if media_type == responses.PNG:
                content = await service.in_thread(lambda: responses.encode_png(image, view, alpha, mask), large=large)
            else:
                name = service.settings.name
                content = await service.in_thread(lambda: to_json(responses.describe(image, name, share)), large=large)
            held.pop_all()  # the response gives its memory back
        image.seconds["encode"] = time.monotonic() - started
        service.metrics.stage_seconds.labels("encode").observe(image.seconds["encode"])
        headers = {"Server-Timing": responses.server_timing(image), "Vary": "Accept"}
        return responses.HeldResponse(content, share, headers=headers, media_type=media_type)

    @router.post(
        "/segment/batch",
        summary="Segment several images",
        description=f"A form with up to {limits.batch_images} files. An image that cannot be read is reported in "
        "its place; the request fails only if none can be read.",
        responses=api_schema.BATCH_RESPONSES,
        openapi_extra=api_schema.IMAGES_BODY,
        response_class=Response,
    )
    async def segment_batch(request: Request) -> Response:
        if not responses.accepts(request.headers.get("accept"), responses.JSON):
            raise HttpError(
                406, "this address returns application/json, which the Accept header does not allow", kind="accept"
            )
        with ExitStack() as held:
            share = held.enter_context(service.memory.share(request.state.client))
            uploads = await _uploads(request, share, maximum=limits.batch_images)
            places = asyncio.Semaphore(service.settings.model.options.batch)  # one batch of this request at a time

            async def segment_one(upload: Upload) -> dict[str, object]:
                async with places:
                    return await _batch_entry(service, upload, share)

            entries = await until_gone(request, all_of(segment_one(upload) for upload in uploads))
            if all("error" in entry for entry in entries):
                raise HttpError(400, f"no image could be read; the first: {entries[0]['error']}", kind="picture")
            content = await service.in_thread(lambda: to_json({"results": entries}), large=True)
            held.pop_all()  # the response gives its memory back
        return responses.HeldResponse(content, share, headers={}, media_type=responses.JSON)

    async def _uploads(request: Request, share: Share, maximum: int) -> list[Upload]:
        started = time.monotonic()
        with service.arriving(share.client):
            body = await read_body(request, share, limits)
        service.metrics.stage_seconds.labels("read").observe(time.monotonic() - started)
        uploads = await read_uploads(request, body, share, limits)
        if len(uploads) > maximum:
            raise HttpError(400, f"{len(uploads)} files; send several to /v1/segment/batch", kind="form")
        return uploads

    return router


async def _batch_entry(service: Service, upload: Upload, share: Share) -> dict[str, object]:
    try:
        image = await service.segment_file(upload.data, share)
        large = is_large(image.segmentation.labels)
        description = await service.in_thread(
            lambda: responses.describe(image, service.settings.name, share), large=large
        )
    except HttpError as error:
        if error.status == 503:  # not this image's fault: the client should send the whole request again
            raise
        return {"name": upload.name, "error": error.reason, "status": error.status}
    return {"name": upload.name, **description}


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `works`, which run together. When one fails, the others end before its error is raised.

    They would run on for nobody, with memory that is no longer counted once the request has got its response.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HttpError(400, "the client went away", kind="gone")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

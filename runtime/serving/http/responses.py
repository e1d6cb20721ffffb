# SPDX-License-Identifier: Apache-2.0
"""Responses for a segmented image: content negotiation, the PNG of labels or overlay, the JSON, Server-Timing."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internimage_deploy.runtime.imaging.results import Mask, png
from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http import image_codec
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.service import SegmentedImage

PNG = "image/png"
JSON = "application/json"

_LONGEST_ACCEPT = 4096  # characters of an Accept header that count; browsers send 200
_SENT_AT_ONCE = 1 << 18


def negotiate(accept: str | None) -> str:
    """`image/png` or `application/json`, whichever the Accept header prefers; PNG if it has no preference.

    Raises:
        HttpError: 406, it accepts neither.
    """
    if not accept or not accept.strip():
        return PNG
    best, best_quality = "", 0.0
    for media_type in (PNG, JSON):
        quality = _quality(accept, media_type)
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise HttpError(
            406, f"this address returns {PNG} or {JSON}, and the Accept header allows neither", kind="accept"
        )
    return best


def accepts(accept: str | None, media_type: str) -> bool:
    """True when the Accept header allows `media_type`."""
    return not accept or not accept.strip() or _quality(accept, media_type) > 0


def encode_png(image: SegmentedImage, view: str, alpha: float, mask: Mask) -> bytes:
    """A PNG file of the labels, see `ResultOptions.mask`, or with the view "overlay" of the overlay."""
    segmentation = image.segmentation
    return png(segmentation.overlay(alpha)) if view == "overlay" else segmentation.mask(mask)


def describe(image: SegmentedImage, model: str, share: Share) -> dict[str, object]:
    """Size, classes with shares, colours and run-length masks, and times in milliseconds, for `to_json`.

    Raises:
        HttpError: 406, see `image_codec.run_lengths`; 503, `share` cannot take what they need.
    """
    segmentation = image.segmentation
    height, width = segmentation.labels.shape
    masks = image_codec.run_lengths(segmentation.labels, share)
    return {
        "model": model,
        "width": width,
        "height": height,
        "classes": [
            {
                "id": index,
                "class": segmentation.classes[index],
                "color": list(segmentation.palette[index]),
                "pixels": count,
                "share": count / segmentation.labels.size,
                "rle": {"size": [height, width], "counts": masks[index]},
            }
            for index, count in segmentation.pixels().items()
        ],
        "timing_ms": {stage: round(seconds * 1e3, 3) for stage, seconds in image.seconds.items()},
        "batch": image.batch,
    }


class HeldResponse(Response):
    """A response whose memory counts until the client has taken it; it is sent in pieces, at the client's pace.

    Args:
        content: the body.
        share: what it holds of the memory of all requests; released at the end.
        headers: of the response.
        media_type: of the body.
    """

    def __init__(self, content: bytes, share: Share, *, headers: dict[str, str], media_type: str) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._share = share

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            body = memoryview(self.body)
            for start in range(0, max(len(body), 1), _SENT_AT_ONCE):
                piece = bytes(body[start : start + _SENT_AT_ONCE])
                more = start + _SENT_AT_ONCE < len(body)
                await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            self._share.release()


def server_timing(image: SegmentedImage) -> str:
    """The stages as a Server-Timing header, in milliseconds."""
    return ", ".join(f"{stage};dur={seconds * 1e3:.2f}" for stage, seconds in image.seconds.items())


def _quality(accept: str, media_type: str) -> float:
    """The q value, 0 to 1, of `media_type` in an Accept header: the most specific range that covers it decides."""
    best = (-1, 0.0)
    for part in accept[:_LONGEST_ACCEPT].split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        ranges = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
        if name not in ranges:
            continue
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = min(max(float(parameter[2:]), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        best = max(best, (ranges.index(name), quality if quality == quality else 0.0))
    return best[1]

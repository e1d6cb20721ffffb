# SPDX-License-Identifier: Apache-2.0
"""What a segmented picture looks like to a client: label map, overlay, or JSON."""

from __future__ import annotations

from typing import Any

from internimage_deploy.runtime.serving.http import image_codec as pictures
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.service import Answer

PNG = "image/png"
JSON = "application/json"


def negotiate(accept: str | None) -> str:
    """`image/png` or `application/json`, whichever the Accept header prefers; PNG when it does not care.

    Raises:
        Refusal: 406, it accepts neither.
    """
    if not accept or not accept.strip():
        return PNG
    best, best_quality = "", 0.0
    for kind in (PNG, JSON):
        quality = _quality(accept, kind)
        if quality > best_quality:
            best, best_quality = kind, quality
    if not best:
        raise Refusal(406, f"this service answers {PNG} and {JSON}", kind="accept")
    return best


def accepts(accept: str | None, kind: str) -> bool:
    """True when the Accept header allows `kind`."""
    return not accept or not accept.strip() or _quality(accept, kind) > 0


def _quality(accept: str, kind: str) -> float:
    """How much `accept` wants `kind`, 0 to 1: the most specific range that covers it decides."""
    found = (-1, 0.0)
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        ranges = ("*/*", f"{kind.partition('/')[0]}/*", kind)
        if name not in ranges:
            continue
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = min(max(float(parameter[2:]), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        found = max(found, (ranges.index(name), quality if quality == quality else 0.0))
    return found[1]


def image(answer: Answer, view: str, alpha: float) -> bytes:
    """A PNG: `view` is `labels` (8-bit ids; 16-bit above 256 classes) or `overlay`."""
    return pictures.png(answer.result.overlay(alpha) if view == "overlay" else answer.result.labels)


def facts(answer: Answer, name: str) -> dict[str, Any]:
    """Size, classes with shares, colours and run-length masks, and times in milliseconds, as plain data."""
    result = answer.result
    height, width = result.labels.shape
    masks = pictures.run_lengths(result.labels)
    return {
        "model": name,
        "width": width,
        "height": height,
        "classes": [
            {
                "id": entry["id"],
                "class": entry["class"],
                "color": list(result.palette[entry["id"]]),
                "pixels": entry["pixels"],
                "share": entry["share"],
                "rle": {"size": [height, width], "counts": masks[entry["id"]]},
            }
            for entry in result.summary()["classes"]
        ],
        "timing_ms": {stage: round(seconds * 1e3, 3) for stage, seconds in answer.seconds.items()},
        "batch": answer.batch,
    }


def server_timing(answer: Answer) -> str:
    """The stages as a Server-Timing header, in milliseconds."""
    return ", ".join(f"{stage};dur={seconds * 1e3:.2f}" for stage, seconds in answer.seconds.items())

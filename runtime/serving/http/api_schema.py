# SPDX-License-Identifier: Apache-2.0
"""What the OpenAPI page says about bodies and answers that are not JSON models."""

from __future__ import annotations

from typing import Any

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "The reason, for people."}},
}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("The request is broken, or its picture cannot be read."),
    401: _error("The bearer token is missing or wrong."),
    404: _error("No such model or address."),
    406: _error("The answer cannot be given in an accepted type."),
    408: _error("The body came too slowly."),
    413: _error("The body, the picture or the number of pictures is above the limit."),
    415: _error("Neither a picture nor a form, or an unknown content coding."),
    422: _error("A parameter is outside its range, or the model cannot take this picture."),
    429: _error("Too many requests of this client; Retry-After says when to come back."),
    503: _error("Loading, overloaded or shutting down; Retry-After says when to come back."),
}
UNREADY: dict[int | str, dict[str, Any]] = {503: {"description": "Loading, shutting down, or without a worker."}}

_SEGMENTATION = {
    "type": "object",
    "required": ["model", "width", "height", "classes", "timing_ms", "batch"],
    "properties": {
        "model": {"type": "string"},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "classes": {
            "type": "array",
            "description": "The classes that occur, most frequent first.",
            "items": {
                "type": "object",
                "required": ["id", "class", "color", "pixels", "share", "rle"],
                "properties": {
                    "id": {"type": "integer"},
                    "class": {"type": "string"},
                    "color": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3},
                    "pixels": {"type": "integer"},
                    "share": {"type": "number"},
                    "rle": {
                        "type": "object",
                        "description": "COCO's uncompressed run lengths: down the columns, outside first.",
                        "properties": {
                            "size": {"type": "array", "items": {"type": "integer"}},
                            "counts": {"type": "array", "items": {"type": "integer"}},
                        },
                    },
                },
            },
        },
        "timing_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "batch": {"type": "integer", "description": "Pictures that ran together with this one."},
    },
}
_FORM_FILE = {"type": "object", "required": ["image"], "properties": {"image": _BINARY["schema"]}}
_FORM_FILES = {
    "type": "object",
    "required": ["images"],
    "properties": {"images": {"type": "array", "minItems": 1, "items": _BINARY["schema"]}},
}

PICTURE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {"schema": _FORM_FILE},
        },
    }
}
PICTURES_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM_FILES}}}
}
SEGMENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The labels, the overlay, or the facts.",
        "content": {"image/png": _BINARY, "application/json": {"schema": _SEGMENTATION}},
    },
    **ERRORS,
}
BATCH_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One entry for each file, in order: as /v1/segment, or an error.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["results"],
                    "properties": {"results": {"type": "array", "items": {"type": "object"}}},
                }
            }
        },
    },
    **ERRORS,
}

_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string", "enum": ["image"]},
        "datatype": {"type": "string", "enum": ["UINT8"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 4, "maxItems": 4},
        "data": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        "parameters": {"type": "object"},
    },
}
INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                        "outputs": {"type": "array", "items": {"type": "object"}},
                        "parameters": {"type": "object"},
                    },
                }
            },
            "application/octet-stream": _BINARY,
        },
    }
}
INFER_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The labels; as JSON, or with the tensor's bytes after the JSON.",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["model_name", "outputs"]}},
            "application/octet-stream": _BINARY,
        },
    },
    **ERRORS,
}

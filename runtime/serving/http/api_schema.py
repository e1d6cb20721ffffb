# SPDX-License-Identifier: Apache-2.0
"""OpenAPI descriptions of the bodies and responses that are not JSON models."""

from __future__ import annotations

from typing import Any

# The shape of FastAPI's own parameters `openapi_extra` and `responses`.
Schema = dict[str, Any]
Responses = dict[int | str, Schema]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "The reason, for people."}},
}


def _error(description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}


ERRORS: Responses = {
    400: _error("The request is broken, or its image cannot be read."),
    401: _error("The bearer token is missing or wrong."),
    404: _error("No such model or address."),
    406: _error("The Accept header allows no type of this address."),
    408: _error("The body arrived too slowly."),
    413: _error("The body, the image or the number of images is above the limit."),
    414: _error("The query is too long."),
    415: _error("Neither an image nor a form, or an unknown content coding."),
    422: _error("A parameter is outside its range, or the model cannot take this image."),
    429: _error("Too many requests of this client; Retry-After says when to try again."),
    503: _error("Loading, overloaded or shutting down; Retry-After says when to try again."),
}
UNREADY: Responses = {503: {"description": "Loading, shutting down, or without a worker."}}

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
                        "description": "COCO's uncompressed run lengths: down the columns, the outside first.",
                        "properties": {
                            "size": {"type": "array", "items": {"type": "integer"}},
                            "counts": {"type": "array", "items": {"type": "integer"}},
                        },
                    },
                },
            },
        },
        "timing_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "batch": {"type": "integer", "description": "Number of images in the batch this one ran in."},
    },
}
_FORM_FILE = {"type": "object", "required": ["image"], "properties": {"image": _BINARY["schema"]}}
_FORM_FILES = {
    "type": "object",
    "required": ["images"],
    "properties": {"images": {"type": "array", "minItems": 1, "items": _BINARY["schema"]}},
}

IMAGE_BODY: Schema = {
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
IMAGES_BODY: Schema = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM_FILES}}}}
SEGMENT_RESPONSES: Responses = {
    200: {
        "description": "The labels or the overlay as PNG, or class shares and masks as JSON.",
        "content": {"image/png": _BINARY, "application/json": {"schema": _SEGMENTATION}},
    },
    **ERRORS,
}
BATCH_RESPONSES: Responses = {
    200: {
        "description": "One entry for each file, in order: the JSON of /v1/segment, or an error.",
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
INFER_BODY: Schema = {
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
INFER_RESPONSES: Responses = {
    200: {
        "description": "The labels; as JSON, or with the tensor's bytes after the JSON.",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["model_name", "outputs"]}},
            "application/octet-stream": _BINARY,
        },
    },
    **ERRORS,
}

# SPDX-License-Identifier: Apache-2.0
"""Open Inference Protocol v2: requests and answers as JSON, or JSON followed by binary tensors.

The model it shows is the whole pipeline: `image` (N, H, W, 3) UINT8 RGB of any size in, `labels` (N, H, W) at that
size out. See https://github.com/kserve/open-inference-protocol and Triton's binary tensor extension.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard, label_dtype
from internimage_deploy.runtime.serving.http_error import Refusal

VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
MOST_JSON = 8 << 20  # numbers in JSON take many times their size; larger tensors come as binary
JSON_MEMORY = 20  # bytes of memory for a byte of JSON, at worst


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for."""

    id: str
    image: npt.NDArray[np.uint8]  # (N, H, W, 3)
    binary: bool  # the answer's tensor as binary


def label_type(card: ModelCard) -> str:
    """The protocol's name for the label type."""
    return "UINT8" if label_dtype(len(card.classes)) is np.uint8 else "INT32"


def model_metadata(name: str, card: ModelCard) -> dict[str, Any]:
    """The answer to `GET /v2/models/NAME`."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "internimage_deploy",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [{"name": "labels", "datatype": label_type(card), "shape": [-1, -1, -1]}],
    }


def model_config(name: str, card: ModelCard) -> dict[str, Any]:
    """The answer to `GET /v2/models/NAME/config`, with the fields Triton's clients read."""
    return {
        "name": name,
        "platform": "internimage_deploy",
        "backend": "internimage_deploy",
        "max_batch_size": 0,  # the batch is an ordinary dimension here
        "input": [{"name": "image", "data_type": "TYPE_UINT8", "dims": [-1, -1, -1, 3]}],
        "output": [{"name": "labels", "data_type": f"TYPE_{label_type(card)}", "dims": [-1, -1, -1]}],
        "parameters": {"classes": {"string_value": json.dumps(card.classes)}},
    }


def read_request(body: bytes, header_length: str | None, *, most_pictures: int, most_pixels: int) -> InferRequest:
    """The request in `body`. Refuses with 400 or 413, with the reason in the protocol's terms."""
    text, binary = _split(body, header_length)
    request = _object(text)
    identity = request.get("id", "")
    parameters = request.get("parameters", {})
    if not isinstance(identity, str) or not isinstance(parameters, dict):
        raise _bad("'id' must be a string and 'parameters' an object")
    tensor = _one(request.get("inputs"), "inputs", "image")
    image = _image(tensor, binary, most_pictures, most_pixels)
    wants_binary = parameters.get("binary_data_output", False)
    if request.get("outputs"):
        output = _one(request["outputs"], "outputs", "labels")
        asked = _parameters(output)
        if "shared_memory_region" in asked or "classification" in asked:
            raise _bad("shared memory and classification outputs are not supported")
        wants_binary = asked.get("binary_data", wants_binary)
    if not isinstance(wants_binary, bool):
        raise _bad("'binary_data' must be true or false")
    return InferRequest(identity, image, wants_binary)


def write_answer(name: str, request: InferRequest, labels: npt.NDArray[Any]) -> tuple[bytes, dict[str, str], str]:
    """Body, extra headers and content type of the answer to `request`; `labels` (N, H, W)."""
    kind = "UINT8" if labels.dtype == np.uint8 else "INT32"
    tensor: dict[str, Any] = {"name": "labels", "datatype": kind, "shape": list(labels.shape)}
    answer: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": [tensor]}
    if request.id:
        answer["id"] = request.id
    if not request.binary:
        tensor["data"] = labels.ravel().tolist()
        return json.dumps(answer).encode(), {}, "application/json"
    raw = np.ascontiguousarray(labels, labels.dtype.newbyteorder("<")).tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps(answer).encode()
    return header + raw, {HEADER_LENGTH: str(len(header))}, "application/octet-stream"


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 12):
            raise _bad(f"{HEADER_LENGTH} must be a number")
        length = int(header_length)
        if length > len(body):
            raise _bad(f"{HEADER_LENGTH} is {length}, the body has {len(body)} bytes")
    if length > MOST_JSON:
        raise Refusal(413, f"more than {MOST_JSON:,} bytes of JSON; send the tensor as binary data", kind="size")
    return body[:length], body[length:]


def _object(text: bytes) -> dict[str, Any]:
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad("the request is not JSON") from error
    if not isinstance(request, dict):
        raise _bad("the request must be a JSON object")
    return request


def _one(tensors: Any, what: str, name: str) -> dict[str, Any]:
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise _bad(f"'{what}' must be a list of one tensor, '{name}'")
    tensor: dict[str, Any] = tensors[0]
    if tensor.get("name") != name:
        raise _bad(f"unexpected tensor in '{what}'; this model has '{name}'")
    return tensor


def _parameters(tensor: dict[str, Any]) -> dict[str, Any]:
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _bad("'parameters' must be an object")
    return parameters


def _image(tensor: dict[str, Any], binary: bytes, most_pictures: int, most_pixels: int) -> npt.NDArray[np.uint8]:
    if tensor.get("datatype") != "UINT8":
        raise _bad("'image' must have the datatype UINT8")
    shape = tensor.get("shape")
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not whole or len(shape) != 4 or shape[3] != 3:  # type: ignore[arg-type, index]
        raise _bad("'image' must have the shape [N, H, W, 3] with positive sizes")
    assert isinstance(shape, list)
    count, height, width, _ = shape
    if count > most_pictures or height * width > most_pixels:
        raise Refusal(413, f"at most {most_pictures} pictures of {most_pixels:,} pixels in one request", kind="pixels")
    size = count * height * width * 3
    parameters = _parameters(tensor)
    if "shared_memory_region" in parameters:
        raise _bad("shared memory is not supported")
    if "binary_data_size" in parameters:
        if "data" in tensor:
            raise _bad("'image' has both 'data' and 'binary_data_size'")
        if parameters["binary_data_size"] != size or len(binary) != size:
            raise _bad(f"'image' of shape {shape} has {size} bytes; announced or sent were others")
        return np.frombuffer(binary, np.uint8).reshape(shape)
    if binary:
        raise _bad("binary data after the JSON, but no tensor has 'binary_data_size'")
    return _numbers(tensor.get("data"), size).reshape(shape)


def _numbers(data: Any, size: int) -> npt.NDArray[np.uint8]:
    try:
        values = np.asarray(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise _bad("'data' must be a list of numbers, flat or nested like the shape") from error
    if values.size != size or values.dtype.kind not in "iu":
        raise _bad(f"'data' must hold {size} whole numbers, as the shape says")
    if values.min() < 0 or values.max() > 255:
        raise _bad("'data' must lie in 0 to 255")
    return values.astype(np.uint8)


def _bad(reason: str) -> Refusal:
    return Refusal(400, reason, kind="protocol")

# SPDX-License-Identifier: Apache-2.0
"""Open Inference Protocol v2: requests and responses as JSON, or JSON followed by binary tensors.

The model that clients see is the whole pipeline: from `image` (N, H, W, 3), UINT8 RGB of any size, to `labels`
(N, H, W) at that size. See https://github.com/kserve/open-inference-protocol and Triton's binary tensor extension.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard, label_dtype
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.http.json_writer import to_json
from internimage_deploy.runtime.serving.http_error import HttpError

VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON = 8 << 20  # numbers in JSON take many times their size; larger tensors come as binary
JSON_MEMORY = 20  # bytes of memory for a byte of JSON, at worst
_NUMBER_BYTES = 5  # of a label in JSON, with its comma

Json = dict[str, object]

_MAX_NESTING = 5  # the four dimensions of the shape, and the list of numbers itself


@dataclass(frozen=True)
class InferRequest:
    """A request for labels."""

    id: str
    image: npt.NDArray[np.uint8]  # (N, H, W, 3)
    binary: bool  # return the tensor as binary data


def label_type(card: ModelCard) -> str:
    """The protocol's name for the label type."""
    return "UINT8" if label_dtype(len(card.classes)) is np.uint8 else "INT32"


def model_metadata(name: str, card: ModelCard) -> Json:
    """The response to `GET /v2/models/NAME`."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "internimage_deploy",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [{"name": "labels", "datatype": label_type(card), "shape": [-1, -1, -1]}],
    }


def model_config(name: str, card: ModelCard) -> Json:
    """The response to `GET /v2/models/NAME/config`, with the fields Triton's clients read."""
    return {
        "name": name,
        "platform": "internimage_deploy",
        "backend": "internimage_deploy",
        "max_batch_size": 0,  # the batch is an ordinary dimension here
        "input": [{"name": "image", "data_type": "TYPE_UINT8", "dims": [-1, -1, -1, 3]}],
        "output": [{"name": "labels", "data_type": f"TYPE_{label_type(card)}", "dims": [-1, -1, -1]}],
        "parameters": {"classes": {"string_value": json.dumps(card.classes)}},
    }


def read_request(
    body: bytes | bytearray, header_length: str | None, *, max_images: int, max_pixels: int
) -> InferRequest:
    """Parse a request.

    Args:
        body: JSON, or JSON followed by the binary tensor.
        header_length: the header `Inference-Header-Content-Length`: bytes of JSON in `body`.
        max_images: maximum number of images.
        max_pixels: maximum number of pixels of each.

    Raises:
        HttpError: 400 or 413, with the reason in the protocol's terms.
    """
    text, binary = _split(body, header_length)
    request = _object(text)
    identity = request.get("id", "")
    parameters = request.get("parameters", {})
    if not isinstance(identity, str) or not isinstance(parameters, dict):
        raise _bad("'id' must be a string and 'parameters' an object")
    tensor = _single_tensor(request.get("inputs"), "inputs", "image")
    image = _image(tensor, binary, max_images, max_pixels)
    binary_output: object = parameters.get("binary_data_output", False)
    if request.get("outputs"):
        output = _single_tensor(request["outputs"], "outputs", "labels")
        output_parameters = _parameters(output)
        if "shared_memory_region" in output_parameters or "classification" in output_parameters:
            raise _bad("shared memory and classification outputs are not supported")
        binary_output = output_parameters.get("binary_data", binary_output)
    if not isinstance(binary_output, bool):
        raise _bad("'binary_data' must be true or false")
    return InferRequest(identity, image, binary_output)


def write_response(name: str, request: InferRequest, labels: Labels) -> tuple[bytes, dict[str, str], str]:
    """Body, extra headers and content type of the response to `request`; `labels` (N, H, W)."""
    datatype = "UINT8" if labels.dtype == np.uint8 else "INT32"
    tensor: Json = {"name": "labels", "datatype": datatype, "shape": list(labels.shape)}
    response: Json = {"model_name": name, "model_version": VERSION, "outputs": [tensor]}
    if request.id:
        response["id"] = request.id
    if not request.binary:
        tensor["data"] = labels.ravel()
        return to_json(response), {}, "application/json"
    raw = np.ascontiguousarray(labels, labels.dtype.newbyteorder("<")).tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps(response).encode()
    return header + raw, {HEADER_LENGTH: str(len(header))}, "application/octet-stream"


def response_memory(request: InferRequest, labels: Labels) -> int:
    """Bytes that `write_response` takes for images whose labels are as large as `labels` (H, W), at most."""
    size = labels.size * len(request.image)
    return size * (3 * labels.itemsize if request.binary else labels.itemsize + 2 * _NUMBER_BYTES)


def _split(body: bytes | bytearray, header_length: str | None) -> tuple[bytes, memoryview]:
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 12):
            raise _bad(f"{HEADER_LENGTH} must be a number")
        length = int(header_length)
        if length > len(body):
            raise _bad(f"{HEADER_LENGTH} is {length}, the body has {len(body)} bytes")
    if length > MAX_JSON:
        raise HttpError(413, f"more than {MAX_JSON:,} bytes of JSON; send the tensor as binary data", kind="size")
    return bytes(body[:length]), memoryview(body)[length:]


def _object(text: bytes) -> Json:
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad("the request is not JSON") from error
    if not isinstance(request, dict):
        raise _bad("the request must be a JSON object")
    return request


def _single_tensor(tensors: object, field: str, name: str) -> Json:
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise _bad(f"'{field}' must be a list of one tensor, '{name}'")
    tensor: Json = tensors[0]
    if tensor.get("name") != name:
        raise _bad(f"unexpected tensor in '{field}'; this model has '{name}'")
    return tensor


def _parameters(tensor: Json) -> Json:
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _bad("'parameters' must be an object")
    return parameters


def _image(tensor: Json, binary: memoryview, max_images: int, max_pixels: int) -> npt.NDArray[np.uint8]:
    if tensor.get("datatype") != "UINT8":
        raise _bad("'image' must have the datatype UINT8")
    count, height, width, _ = shape = _shape(tensor.get("shape"))
    if count > max_images or height * width > max_pixels:
        raise HttpError(413, f"at most {max_images} images of {max_pixels:,} pixels in one request", kind="pixels")
    size = count * height * width * 3
    parameters = _parameters(tensor)
    if "shared_memory_region" in parameters:
        raise _bad("shared memory is not supported")
    if "binary_data_size" in parameters:
        if "data" in tensor:
            raise _bad("'image' has both 'data' and 'binary_data_size'")
        if parameters["binary_data_size"] != size or len(binary) != size:
            raise _bad(
                f"'image' of shape {list(shape)} has {size} bytes, which 'binary_data_size' and the body must match"
            )
        return np.frombuffer(binary, np.uint8).reshape(shape)
    if binary:
        raise _bad("binary data after the JSON, but no tensor has 'binary_data_size'")
    return _numbers(tensor.get("data"), size).reshape(shape)


def _shape(shape: object) -> tuple[int, int, int, int]:
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(side) is int and side > 0 for side in shape):
        raise _bad("'image' must have the shape [N, H, W, 3] with positive sizes")
    count, height, width, channels = shape
    if channels != 3:
        raise _bad("'image' must have the shape [N, H, W, 3] with positive sizes")
    return count, height, width, channels


def _numbers(data: object, size: int) -> npt.NDArray[np.uint8]:
    # Looked at before NumPy sees it: a single string among numbers would make it an array of strings of that length.
    numbers = data
    for _ in range(_MAX_NESTING):
        if not isinstance(numbers, list):
            raise _bad("'data' must be a list of numbers, flat or nested like the shape")
        if not all(type(item) is list for item in numbers):
            break
        numbers = list(itertools.chain.from_iterable(numbers))
    assert isinstance(numbers, list)
    if len(numbers) != size or not all(type(item) is int for item in numbers):
        raise _bad(f"'data' must hold {size} whole numbers, flat or nested like the shape")
    if min(numbers) < 0 or max(numbers) > 255:
        raise _bad("'data' must lie in 0 to 255")
    return np.array(numbers, np.uint8)


def _bad(reason: str) -> HttpError:
    return HttpError(400, reason, kind="protocol")

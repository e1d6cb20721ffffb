# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, used by Triton's own client."""

import json

import numpy as np
import pytest

from support.tiny_models import picture

http = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
from tritonclient.utils import InferenceServerException  # noqa: E402


@pytest.fixture
def client(server):
    with http.InferenceServerClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


def tensor(image, *, binary=True):
    infer_input = http.InferInput("image", image.shape, "UINT8")
    infer_input.set_data_from_numpy(image, binary_data=binary)
    return infer_input


def test_the_metadata_of_server_and_model(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("color")
    assert client.is_model_ready("color", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "internimage-deploy"
    metadata = client.get_model_metadata("color", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert client.get_model_config("color")["output"][0]["data_type"] == "TYPE_UINT8"
    assert client.get_model_repository_index()[0]["state"] == "READY"


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary input", "JSON input"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary output", "JSON output"])
def test_images_become_labels(client, binary_in, binary_out, compression):
    pairs = [picture(24, 36), picture(24, 36, colors=((30, 30, 200), (200, 30, 30)))]
    batch = np.stack([image for image, _ in pairs])
    result = client.infer(
        "color",
        [tensor(batch, binary=binary_in)],
        outputs=[http.InferRequestedOutput("labels", binary_data=binary_out)],
        request_id="seven",
        request_compression_algorithm=compression,
    )
    expected = np.stack([np.array([0, 1, 2])[labels] for _, labels in pairs[:1]])
    found = result.as_numpy("labels")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[:1], expected)
    np.testing.assert_array_equal(found[1], np.array([2, 0])[pairs[1][1]])
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["model_name"] == "color"


def test_without_outputs_the_labels_are_binary(client):
    image, labels = picture(8, 12)
    result = client.infer("color", [tensor(image[None])])
    np.testing.assert_array_equal(result.as_numpy("labels")[0], labels)


@pytest.mark.parametrize(
    ("model", "name", "shape", "kind", "reason"),
    [
        ("other", "image", (1, 8, 8, 3), np.uint8, "one model, 'color'"),
        ("color", "picture", (1, 8, 8, 3), np.uint8, "this model has 'image'"),
        ("color", "image", (8, 8, 3), np.uint8, "shape"),
        ("color", "image", (1, 8, 8, 4), np.uint8, "shape"),
        ("color", "image", (1, 8, 8, 3), np.float32, "UINT8"),
        ("color", "image", (17, 8, 8, 3), np.uint8, "at most 16 images"),
    ],
    ids=["model", "tensor name", "rank", "channels", "type", "count"],
)
def test_a_wrong_request_is_rejected_with_the_reason(client, model, name, shape, kind, reason):
    infer_input = http.InferInput(name, shape, "UINT8" if kind == np.uint8 else "FP32")
    infer_input.set_data_from_numpy(np.zeros(shape, kind))
    with pytest.raises(InferenceServerException, match=reason):
        client.infer(model, [infer_input])


def test_what_is_not_offered_is_rejected(client):
    for call in (
        lambda: client.load_model("color"),
        lambda: client.unload_model("color"),
        lambda: client.get_system_shared_memory_status(),
        lambda: client.infer("color", [tensor(np.zeros((1, 8, 8, 3), np.uint8))], model_version="2"),
    ):
        with pytest.raises(InferenceServerException):
            call()


GOOD = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12}


@pytest.mark.parametrize(
    "request_body",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 100_000, {}, {"inputs": []}, {"inputs": [GOOD, GOOD]}, {"inputs": [7]},
        {"inputs": [{**GOOD, "data": [7] * 11}]}, {"inputs": [{**GOOD, "data": [[7], [7, 7]]}]},
        {"inputs": [{**GOOD, "data": [256] * 12}]}, {"inputs": [{**GOOD, "data": [-1] * 12}]},
        {"inputs": [{**GOOD, "data": [0.5] * 12}]}, {"inputs": [{**GOOD, "data": [10**30] * 12}]},
        {"inputs": [{**GOOD, "data": "A" * 12}]}, {"inputs": [{**GOOD, "data": None}]},
        {"inputs": [{**GOOD, "shape": [1, 2, True, 3]}]}, {"inputs": [{**GOOD, "shape": [1, -2, -2, 3]}]},
        {"inputs": [{**GOOD, "shape": [0, 2, 2, 3], "data": []}]}, {"inputs": [{**GOOD, "shape": "1223"}]},
        {"inputs": [{**GOOD, "shape": [10**12, 10**12, 1, 3]}]}, {"inputs": [{**GOOD, "parameters": 5}]},
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": 12}}]},
        {"inputs": [{**GOOD, "parameters": {"shared_memory_region": "x"}}]},
        {"inputs": [GOOD], "outputs": 5}, {"inputs": [GOOD], "outputs": [{"name": "other"}]},
        {"inputs": [GOOD], "id": 5},
        {"inputs": [GOOD], "outputs": [{"name": "labels", "parameters": {"classification": 3}}]},
        {"inputs": [GOOD], "parameters": {"binary_data_output": "yes"}},
    ],
)  # fmt: skip
def test_broken_requests_get_a_4xx_with_a_reason(server, request_body):
    body = request_body if isinstance(request_body, bytes) else json.dumps(request_body).encode()
    response = server.post("/v2/models/color/infer", content=body)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30, "100000", "3", "²"])
def test_a_wrong_header_length_is_rejected(server, length):
    body = json.dumps({"inputs": [GOOD]}).encode()
    headers = {"Inference-Header-Content-Length": length.encode("latin-1")}
    response = server.post("/v2/models/color/infer", content=body, headers=headers)
    assert response.status_code == 400


def test_a_good_request_is_good(server):
    response = server.post("/v2/models/color/infer", json={"inputs": [GOOD]})
    assert response.json()["outputs"][0]["shape"] == [1, 2, 2]

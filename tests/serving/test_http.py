# SPDX-License-Identifier: Apache-2.0
"""The service's own interface, against direct calls of the same model."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.window import Window
from support.served import Served, decoded, encoded, stripes
from support.tiny_models import color_model, picture

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def segmenter(color_path):
    return Segmenter.load(color_path)


def unpack(entry):
    """A mask from COCO's run lengths, one run after another."""
    height, width = entry["rle"]["size"]
    flat, at, inside = np.zeros(height * width, bool), 0, False
    for count in entry["rle"]["counts"]:
        flat[at : at + count] = inside
        at, inside = at + count, not inside
    assert at == height * width
    return flat.reshape(width, height).T


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_image_becomes_its_label_map(server, segmenter, kind):
    data = encoded(picture(50, 70)[0], kind)
    response = server.post("/v1/segment", content=data, headers={"Content-Type": f"image/{kind.lower()}"})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    labels = decoded(response.content)
    expected = segmenter(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).labels
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, expected)
    assert {part.split(";")[0] for part in response.headers["server-timing"].split(", ")} == {
        "decode", "queue", "run", "encode",
    }  # fmt: skip


def test_the_documented_curl_commands_work(server, tmp_path):
    document = (ROOT / "docs" / "serving.md").read_text()
    commands = [line for line in document.splitlines() if line.startswith("curl ")]
    data, labels = stripes()
    (tmp_path / "street.jpg").write_bytes(data)
    outputs = []
    for line in commands:
        words = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        outputs.append(subprocess.run([*words, "-sS", "--fail"], cwd=tmp_path, capture_output=True, check=True).stdout)
    np.testing.assert_array_equal(decoded((tmp_path / "labels.png").read_bytes()), labels)
    assert json.loads(outputs[1])["height"] == labels.shape[0]


def test_a_form_is_read_as_well(server):
    data, labels = stripes(seed=3)
    response = server.post("/v1/segment", files={"image": ("../../etc/passwd", data, "image/png")})
    np.testing.assert_array_equal(decoded(response.content), labels)


def test_the_overlay_is_the_runtimes(server, segmenter):
    image = picture(40, 60)[0]
    response = server.post("/v1/segment?view=overlay&alpha=0.25", content=encoded(image))
    np.testing.assert_array_equal(decoded(response.content), segmenter(image).overlay(0.25))


def test_json_holds_shares_and_masks_that_add_up_to_the_image(server, segmenter):
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    response = server.post("/v1/segment", content=encoded(image), headers={"Accept": "application/json"})
    described = response.json()
    result = segmenter(image)
    assert (described["width"], described["height"], described["model"]) == (53, 37, "color")
    rebuilt = np.full(result.labels.shape, 255)
    for entry in described["classes"]:
        mask = unpack(entry)
        assert mask.sum() == entry["pixels"]
        rebuilt[mask] = entry["id"]
        assert tuple(entry["color"]) == result.palette[entry["id"]]
    np.testing.assert_array_equal(rebuilt, result.labels)
    assert {entry["class"]: entry["share"] for entry in described["classes"]} == pytest.approx(result.shares())


@pytest.mark.parametrize(
    ("accept", "status", "kind"),
    [
        ("*/*", 200, "image/png"),
        ("image/*", 200, "image/png"),
        ("application/json", 200, "application/json"),
        ("image/png;q=0.2, application/json;q=0.9", 200, "application/json"),
        ("image/png;q=0, */*", 200, "application/json"),
        ("text/html", 406, "application/json"),
        ("image/png;q=0", 406, "application/json"),
    ],
)
def test_the_accept_header_chooses(server, accept, status, kind):
    response = server.post("/v1/segment", content=stripes()[0], headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (status, kind)


def test_a_batch_keeps_the_order_and_reports_a_broken_image_in_its_place(server):
    files = [stripes(seed=seed) for seed in range(5)]
    parts = [("images", (f"{i}.png", data, "image/png")) for i, (data, _) in enumerate(files)]
    parts.insert(2, ("images", ("broken.png", b"no image", "image/png")))
    results = server.post("/v1/segment/batch", files=parts).json()["results"]
    assert [entry["name"] for entry in results] == ["0.png", "1.png", "broken.png", "2.png", "3.png", "4.png"]
    broken = results.pop(2)
    assert (broken["status"], set(broken)) == (400, {"name", "error", "status"})
    for entry, (_, labels) in zip(results, files, strict=True):
        for found in entry["classes"]:
            np.testing.assert_array_equal(unpack(found), labels == found["id"])


def test_a_batch_without_any_image_fails(server):
    response = server.post("/v1/segment/batch", files=[("images", ("a.png", b"x")), ("images", ("b.png", b"y"))])
    assert response.status_code == 400
    assert "no image could be read" in response.json()["error"]


def test_more_than_256_classes_give_16_bit_labels(tmp_path):
    many = color_model(tmp_path / "many.onnx", classes=tuple(f"c{i}" for i in range(300)))
    with Served(many, tmp_path) as server:
        data, labels = stripes()
        found = decoded(server.post("/v1/segment", content=data).content)
    assert found.dtype.itemsize == 2
    np.testing.assert_array_equal(found, labels)


def test_a_sliding_window_gives_the_labels_of_the_segmenter(tmp_path):
    path = color_model(tmp_path / "fixed.onnx", size=(32, 32))
    data = encoded(np.random.default_rng(1).integers(0, 256, (80, 112, 3), np.uint8))
    image = decoded(data)
    with Served(path, tmp_path, "--slide", "--crop", "32x32", "--stride", "16x24") as server:
        labels = decoded(server.post("/v1/segment", content=data).content)
    np.testing.assert_array_equal(labels, Segmenter.load(path, window=Window((32, 32), (16, 24)))(image).labels)
    assert (labels != Segmenter.load(path)(image).labels).any(), "the same without a window"


def test_a_model_with_a_window_is_slid_like_segment_does(tmp_path):
    """The file returns labels, and the image's crops count in the batches."""
    path = color_model(tmp_path / "m.onnx", labels=True, window=Window((32, 32), (16, 24)))
    image = np.random.default_rng(1).integers(0, 256, (80, 112, 3), np.uint8)
    (tmp_path / "i.png").write_bytes(encoded(image))
    out = {}
    for name, options in (("slid", ()), ("whole", ("--whole",))):
        files = [path, tmp_path / "i.png", "-o", tmp_path / name]
        subprocess.run([sys.executable, "-m", "internimage_deploy", "segment", *files, *options], check=True)
        out[name] = np.asarray(Image.open(tmp_path / name / "i.labels.png"))
    assert (out["slid"] != out["whole"]).any()
    with Served(path, tmp_path, "--delay-ms", "0") as server:
        labels = decoded(server.post("/v1/segment", content=encoded(image)).content)
        np.testing.assert_array_equal(labels, out["slid"])
        parts = [("images", (f"{i}.png", encoded(image), "image/png")) for i in range(3)]
        results = server.post("/v1/segment/batch", files=parts).json()["results"]
        for entry in results:
            for found in entry["classes"]:
                np.testing.assert_array_equal(unpack(found), out["slid"] == found["id"])
        # 5 by 5 crops at 96x128: more than a batch of eight, so that no two images run together.
        assert server.metric("internimage_batch_size_sum") == server.metric("internimage_batch_size_count") == 4
    with Served(path, tmp_path, "--whole") as server:
        labels = decoded(server.post("/v1/segment", content=encoded(image)).content)
        np.testing.assert_array_equal(labels, out["whole"])


def test_crops_count_in_the_memory_of_a_request(tmp_path):
    """At 512x512 there are 121 by 121 crops of 3 x 8 x 8 logits: 11 MB, of 10 that all requests may take."""
    path = color_model(tmp_path / "m.onnx", labels=True, window=Window((32, 32), (4, 4)))
    data = encoded(np.zeros((500, 500, 3), np.uint8))
    for options, status in (((), 413), (("--whole",), 200)):
        with Served(path, tmp_path, "--max-memory", "10", *options) as server:
            assert server.post("/v1/segment", content=data).status_code == status
            assert server.metric("internimage_request_memory_bytes") == 0


def test_health_metrics_and_schema(server):
    server.post("/v1/segment", content=stripes()[0])
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    for path in ("/", "/healthz", "/readyz"):
        response = httpx.head(server.url + path)
        assert (response.status_code, response.content) == (200, b"")
    text = server.get("/metrics").text
    for name in ("requests_total", "queue_pictures", "batch_size_bucket", "stage_seconds_bucket", "workers"):
        assert f"\ninternimage_{name}" in text
    for stage in ("read", "decode", "queue", "run", "encode"):
        assert f'stage="{stage}"' in text
    assert 'route="/v1/segment",status="200"' in text
    assert "/v1/segment" in server.get("/openapi.json").json()["paths"]


def test_the_number_of_series_is_not_the_clients_choice(server):
    for number in range(3):
        server.get(f"/made/up/{number}")
        server.get(f"/v2/models/made-up-{number}")
    assert "made" not in server.get("/metrics").text


def test_a_token_is_required_everywhere_but_health_and_page(color_path, tmp_path):
    secret = "a-secret-of-enough-length"
    (tmp_path / "token").write_text(secret + "\n")
    with Served(color_path, tmp_path, "--token-file", tmp_path / "token") as server:
        for path in ("/", "/page.js", "/healthz", "/readyz", "/v2/health/live"):
            assert server.get(path).status_code == 200
        for path in ("/metrics", "/openapi.json", "/v2", "/v2/models/color"):
            assert server.get(path).status_code == 401
            assert server.get(path, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
        data, labels = stripes()
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {secret}"},
                      {"Authorization": f"Bearer {secret}x"}, {"Authorization": "Bearer é"}):  # fmt: skip
            raw = {name: value.encode("latin-1") for name, value in wrong.items()}
            response = server.post("/v1/segment", content=data, headers=raw)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        response = server.post("/v1/segment", content=data, headers={"Authorization": f"bearer {secret}"})
        np.testing.assert_array_equal(decoded(response.content), labels)
        assert secret not in server.log


def test_a_client_above_the_rate_gets_a_time_to_come_back(color_path, tmp_path):
    with Served(color_path, tmp_path, "--rate", "0.001") as server:
        responses = [server.get("/v2") for _ in range(30)]
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 10, "20 at once are free, and the next is after 1000 s"
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert server.get("/healthz").status_code == 200


def test_errors_are_json_with_a_reason(server):
    for response, status in (
        (server.get("/nowhere"), 404),
        (server.get("/v1/segment"), 405),
        (server.post("/v1/segment?view=other", content=stripes()[0]), 422),
        (server.post("/v1/segment?alpha=nan&view=overlay", content=stripes()[0]), 422),
        (server.post("/v1/segment"), 400),
    ):
        assert response.status_code == status
        assert json.loads(response.content)["error"]

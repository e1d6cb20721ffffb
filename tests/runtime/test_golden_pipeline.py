# SPDX-License-Identifier: Apache-2.0
"""Pre- and post-processing against what mmsegmentation computed (tests/data/pipeline_*)."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.runtime.imaging import postprocess, sliding
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.runtime.imaging.postprocess import labels_from_labels, labels_from_logits, labels_from_planes
from internimage_deploy.runtime.imaging.preprocess import free_geometry, network_input, resize_image
from internimage_deploy.window import Window

DATA = Path(__file__).parents[1] / "data"
FLOAT_CARD = ModelCard(
    "any",
    ("a",),
    ((0, 0, 0),),
    TensorSpec("input", "float32", ("batch", 3, "height", "width")),
    TensorSpec("logits", "float32", ("batch", 1, "h4", "w4")),
)


@pytest.fixture(params=["landscape", "portrait"])
def golden(request):
    facts = json.loads((DATA / f"pipeline_{request.param}.json").read_text())
    with np.load(DATA / f"pipeline_{request.param}.npz") as arrays:
        arrays = dict(arrays)
    image = np.ascontiguousarray(arrays["image_bgr"][:, :, ::-1])
    return facts, arrays, image, free_geometry(image.shape[:2], tuple(facts["resize_scale"]), facts["size_divisor"])


def test_sizes_on_the_way(golden):
    facts, _, _, geometry = golden
    assert geometry.keep_ratio == tuple(facts["after_keep_ratio"][:2])
    assert geometry.network == tuple(facts["network_hw"])


def test_network_input(golden):
    _, arrays, image, geometry = golden
    batch = network_input([resize_image(image, geometry, FLOAT_CARD.mean)], FLOAT_CARD)
    assert batch.shape == (1, *arrays["network_input"].shape)
    assert np.abs(batch[0] - arrays["network_input"]).max() < 1e-5


def test_labels_at_the_pictures_size(golden):
    _, arrays, _, geometry = golden
    labels = labels_from_logits(arrays["logits"][0], geometry)
    clear = arrays["margin"] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], arrays["labels_original_size"][clear])


def test_labels_at_network_size(golden):
    _, arrays, _, geometry = golden
    at_network = type(geometry)(geometry.network, geometry.network, geometry.network, geometry.network)
    labels = labels_from_logits(arrays["logits"][0], at_network)
    assert (labels != arrays["labels_network_size"]).mean() < 1e-3


def test_the_tiled_way_and_the_class_by_class_way_agree(golden):
    _, arrays, _, geometry = golden
    logits = arrays["logits"][0]
    height, width = geometry.network
    labels = labels_from_planes(lambda index: cv2.resize(logits[index], (width, height)), len(logits), geometry)
    clear = arrays["margin"] > 1e-3
    np.testing.assert_array_equal(labels[clear], labels_from_logits(logits, geometry)[clear])


def test_one_crop_over_everything_is_whole_inference(golden):
    _, arrays, _, geometry = golden
    places = sliding.crops(geometry.network, Window((512, 512), (341, 341)))
    assert len(places) == 1
    plane = sliding.planes_of_crops([arrays["logits"][0]], places, geometry)
    labels = postprocess.labels_from_planes(plane, arrays["logits"].shape[1], geometry)
    clear = arrays["margin"] > 1e-3
    np.testing.assert_array_equal(labels[clear], arrays["labels_original_size"][clear])


def test_labels_of_the_network_grow_to_the_nearest_pixel(golden):
    _, arrays, _, geometry = golden
    labels = labels_from_labels(arrays["labels_network_size"], geometry, 19)
    # The label-emitting model loses the bilinear edge, nothing else: random weights, so edges are everywhere.
    assert (labels == arrays["labels_original_size"]).mean() > 0.9


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_what_mask2former_returns_becomes_the_official_labels(mode):
    """Its semantic scores take the same way as logits, crop by crop in mode `slide`."""
    facts = json.loads((DATA / f"pipeline_m2f_{mode}.json").read_text())
    with np.load(DATA / f"pipeline_m2f_{mode}.npz") as arrays:
        arrays = dict(arrays)
    scores = arrays["window_logits" if mode == "slide" else "logits"]
    window = Window(tuple(facts["crop_size"]), tuple(facts["stride"])) if mode == "slide" else None
    classes = scores.shape[-3]
    card = dataclasses.replace(
        FLOAT_CARD,
        classes=tuple(map(str, range(classes))),
        palette=((0, 0, 0),) * classes,
        resize=tuple(facts["resize_scale"]),
        window=window,
    )
    pipeline = ImagePipeline(card)
    prepared = pipeline.prepare(np.ascontiguousarray(arrays["image_bgr"][:, :, ::-1]))
    batch = pipeline.network_input([prepared.pixels])
    assert np.abs(batch[0] - arrays["network_input"]).max() < 1e-5
    crops = pipeline.network_input(pipeline.crops(prepared))
    places = facts.get("windows_y1_y2_x1_x2", [[0, facts["network_hw"][0], 0, facts["network_hw"][1]]])
    assert prepared.crop_count == len(crops) == len(places)
    for crop, (top, bottom, left, right) in zip(crops, places, strict=True):
        np.testing.assert_allclose(crop, arrays["network_input"][:, top:bottom, left:right], atol=1e-5)
    labels = pipeline.labels(scores, prepared.geometry)
    clear = arrays["margin"] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], arrays["labels_original_size"][clear])
    most_likely = pipeline.probabilities(scores, prepared.geometry).argmax(0)
    np.testing.assert_array_equal(most_likely[clear], arrays["labels_original_size"][clear])

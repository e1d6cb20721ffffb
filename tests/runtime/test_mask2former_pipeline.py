# SPDX-License-Identifier: Apache-2.0
"""Exported Mask2Former models from an image to labels, whole and sliding, against the official pipeline."""

import numpy as np
import pytest

from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.window import Window
from support import golden
from support.windows import with_window

FREE = ExportOptions(input="float", emit="logits")


def compare(labels, expected):
    clear = expected["margin"] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], expected["labels_original_size"][clear])


@pytest.mark.parametrize("batch", [1, 3])
def test_labels_of_whole_images_are_the_official_ones(batch, exports):
    case, expected = golden.case("pipeline_m2f_whole"), golden.arrays("pipeline_m2f_whole")
    path = exports(case["model"], FREE).path
    image = np.ascontiguousarray(expected["image_bgr"][:, :, ::-1])
    with Segmenter.load(path, "onnxruntime", resize=tuple(case["resize_scale"]), batch=batch) as segmenter:
        for result in segmenter([image] * batch):
            compare(result.labels, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_labels_of_the_sliding_window_are_the_official_ones(batch, exports, tmp_path):
    case, expected = golden.case("pipeline_m2f_slide"), golden.arrays("pipeline_m2f_slide")
    window = Window(tuple(case["crop_size"]), tuple(case["stride"]))
    path = with_window(exports(case["model"], FREE).path, tmp_path / "model.onnx", window)
    image = np.ascontiguousarray(expected["image_bgr"][:, :, ::-1])
    with Segmenter.load(path, "onnxruntime", resize=tuple(case["resize_scale"]), batch=batch) as segmenter:
        prepared = segmenter.prepare(image)
        (scores,) = segmenter.forward([prepared])
        largest = np.abs(expected["window_logits"]).max()
        np.testing.assert_allclose(scores, expected["window_logits"], atol=1e-4 * max(1, largest), rtol=0)
        compare(segmenter.finish(prepared, scores).labels, expected)


def test_a_whole_image_of_a_slid_model(exports, tmp_path):
    case, expected = golden.case("pipeline_m2f_slide"), golden.arrays("pipeline_m2f_slide")
    path = with_window(exports(case["model"], FREE).path, tmp_path / "model.onnx", Window((64, 64), (32, 32)))
    image = np.ascontiguousarray(expected["image_bgr"][:, :, ::-1])
    resize = tuple(case["resize_scale"])
    with Segmenter.load(path, "onnxruntime", resize=resize, window="whole") as segmenter:
        (scores,) = segmenter.forward([segmenter.prepare(image)])
    assert scores.shape == (40, *(side // 4 for side in case["network_hw"]))

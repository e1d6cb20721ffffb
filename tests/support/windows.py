# SPDX-License-Identifier: Apache-2.0
"""Files whose card has a sliding window, and mmsegmentation's mode `slide` written out in NumPy."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from internimage_deploy.card import METADATA_KEY, ModelCard


def with_window(source, target, window, **card_changes):
    """A copy of an ONNX file whose card has a `Window`, and other changes."""
    model = onnx.load(str(source))
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    card = ModelCard.from_json(entry.value)
    entry.value = dataclasses.replace(card, window=window, **card_changes).to_json()
    onnx.save(model, str(target))
    return target


def logits_session(path):
    """A function from a batch (N, h, w, 3) to the logits inside a file that returns labels."""
    model = onnx.load(str(path))
    model.graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [None] * 4))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["logits"], {"image": batch})[0]


def slide(image, crop, stride, logits_of, size):
    """Scores (classes, *size) for an `image` (h, w, 3) at network scale.

    The grid, the last crop moved back, sum, count and quotient are those of mmsegmentation's `slide_inference`; every
    class is at full size, and the interpolation is this file's own.
    """
    height, width = image.shape[:2]
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    total, count = 0.0, np.zeros((height, width))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            logits = logits_of(np.ascontiguousarray(image[None, top:bottom, left:right]))[0]
            placed = np.zeros((len(logits), height, width))
            placed[:, top:bottom, left:right] = bilinear(logits, (bottom - top, right - left))
            total, count[top:bottom, left:right] = total + placed, count[top:bottom, left:right] + 1
    assert count.min() >= 1
    return bilinear(total / count, size)


def bilinear(planes, size):
    """(classes, h, w) resized to `size`, half-pixel centres, borders repeated."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = planes.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        planes = planes.take(low, axis) * (1 - weight) + planes.take(high, axis) * weight
    return planes

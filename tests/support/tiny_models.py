# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models with a card, whose answer is known without running them: the class is the strongest colour."""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD, METADATA_KEY, ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.base import Backend

CLASSES = ("red", "green", "blue")
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def color_model(
    path,
    *,
    size=None,
    batch=None,
    uint8=True,
    labels=False,
    inner="logits",
    resize=None,
    window=None,
    classes=CLASSES,
    card_changes=None,
    with_card=True,
    external=False,
):
    """Write a model: mean of 4x4 pixels, then logits that rank red, green and blue (further classes never win).

    `inner` names the logits of a model that returns labels.
    """
    n = "batch" if batch is None else batch
    height, width = ("height", "width") if size is None else size
    low = ("h4", "w4") if size is None else (size[0] // 4, size[1] // 4)
    count = len(classes)
    weight = np.zeros((count, 3, 1, 1), np.float32)
    weight[:3, :, 0, 0] = np.eye(3)
    bias = np.full(count, -1e3, np.float32)
    # Undo the normalisation, so that the ranking is that of the picture's own values.
    weight[:3] *= np.array(IMAGENET_STD, np.float32)[:, None, None, None]
    bias[:3] = IMAGENET_MEAN
    nodes, initializers = [], {"weight": weight, "bias": bias}
    if uint8:
        source = TensorSpec("image", "uint8", (n, height, width, 3))
        initializers |= {"mean": np.array(IMAGENET_MEAN, np.float32), "std": np.array(IMAGENET_STD, np.float32)}
        nodes += [
            helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["real", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["scaled"]),
            helper.make_node("Transpose", ["scaled"], ["normal"], perm=[0, 3, 1, 2]),
        ]
    else:
        source = TensorSpec("input", "float32", (n, 3, height, width))
        nodes.append(helper.make_node("Identity", ["input"], ["normal"]))
    nodes += [
        helper.make_node("AveragePool", ["normal"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["pooled", "weight", "bias"], [inner if labels else "logits"]),
    ]
    if labels:
        initializers["by4"] = np.array([1, 1, 4, 4], np.float32)
        nodes += [
            helper.make_node("Resize", [inner, "", "by4"], ["grown"], mode="linear"),
            helper.make_node("ArgMax", ["grown"], ["ids"], axis=1, keepdims=0),
            helper.make_node("Cast", ["ids"], ["labels"], to=TensorProto.UINT8),
        ]
        answer = TensorSpec("labels", "uint8", (n, height, width))
    else:
        answer = TensorSpec("logits", "float32", (n, count, *low))
    graph = helper.make_graph(
        nodes,
        "color",
        [_info(source)],
        [_info(answer)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    palette = tuple(PALETTE[i % 3] for i in range(count))
    card = ModelCard("color", tuple(classes), palette, source, answer, resize=resize, window=window)
    if with_card:
        card = dataclasses.replace(card, **(card_changes or {}))
        helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(
        model,
        str(path),
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
        size_threshold=0,
    )
    return path


class Overlapping(Backend):
    """A backend over another one that can start a batch beside another; `events` has what happened, in order."""

    def __init__(self, backend, fail_to_start=(), fail_to_answer=()):
        self.name, self.card, self.in_flight = backend.name, backend.card, 2
        self.backend, self.events, self.started = backend, [], 0
        self.fail_to_start, self.fail_to_answer = set(fail_to_start), set(fail_to_answer)

    def run(self, batch):
        return self.submit(batch)()

    def submit(self, batch):
        number = self.started
        self.started += 1
        self.events.append(f"start {number}")
        if number in self.fail_to_start:
            raise UserError(f"no start of {number}")

        def wait():
            self.events.append(f"wait {number}")
            if number in self.fail_to_answer:
                raise UserError(f"no answer to {number}")
            return self.backend.run(batch)

        return wait


def picture(height, width, colors=((200, 30, 30), (30, 200, 30), (30, 30, 200))):
    """(H, W, 3) uint8 of upright stripes, one colour each, and the labels (H, W) they should get."""
    labels = np.minimum(np.arange(width) * len(colors) // width, len(colors) - 1)
    labels = np.broadcast_to(labels, (height, width))
    return np.array(colors, np.uint8)[labels], labels.astype(np.uint8)


def _info(spec):
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    return helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape)

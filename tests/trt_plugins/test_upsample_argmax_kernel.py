# SPDX-License-Identifier: Apache-2.0
"""UpsampleArgmax, its kernel run on the host, against ONNX Runtime's Resize and ArgMax."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_kernel import LAST_TACTIC, NUMPY

from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins import host
from support.memory import shifted

SHAPES = [(1, 19, 16, 24), (2, 3, 1, 1), (1, 150, 5, 7), (1, 1, 2, 3), (3, 4, 1, 9), (2, 5, 33, 2)]


@pytest.fixture(scope="module")
def labels_of():
    """Logits in float32 -> labels, by ONNX Runtime."""
    nodes = [
        helper.make_node(
            "Resize", ["x", "", "scales"], ["up"], mode="linear", coordinate_transformation_mode="half_pixel"
        ),
        helper.make_node("ArgMax", ["up"], ["y"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["n", "H", "W"])],
        [numpy_helper.from_array(np.float32([1, 1, 4, 4]), "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda logits: session.run(None, {"x": logits.astype(np.float32)})[0]


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels_are_those_of_onnx_runtime_with_every_tactic(shape, dtype, labels_of):
    logits = np.random.default_rng(0).standard_normal(shape).astype(NUMPY[dtype])
    expected = labels_of(logits)
    for tactic in range(LAST_TACTIC + 1):
        np.testing.assert_array_equal(host.upsample_argmax(logits, tactic=tactic), expected)


@pytest.mark.parametrize("tactic", [0, 1, 7])
def test_of_equal_classes_the_lowest_wins(tactic, labels_of):
    # Three values for five classes, exact whatever the order they are added in: ties everywhere.
    logits = np.random.default_rng(1).integers(0, 3, (2, 5, 9, 11)).astype(np.float32)
    np.testing.assert_array_equal(host.upsample_argmax(logits, tactic=tactic), labels_of(logits))
    assert host.upsample_argmax(np.zeros((1, 4, 3, 3), np.float32), tactic=tactic).max() == 0


def test_hand_worked_row():
    # Class 0 falls from 1 to 0, class 1 is 0.5: they meet halfway between the two logits, at positions 3 and 4.
    logits = np.array([[[[1, 0]], [[0.5, 0.5]]]], np.float32)
    assert host.upsample_argmax(logits)[0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 4


@pytest.mark.parametrize("tactic", [1, 7])
def test_wild_logits(tactic):
    logits = np.zeros((1, 3, 2, 2), np.float32)
    logits[0, 0], logits[0, 2] = np.nan, np.inf
    logits[0, 2, 0, 0] = -np.inf  # with infinity beside it, NaN between: no class but 1 is left there
    labels = host.upsample_argmax(logits, tactic=tactic)
    assert set(np.unique(labels)) <= {1, 2}
    assert labels[0, 0, 0] == 1
    assert host.upsample_argmax(np.full((1, 3, 2, 2), np.nan, np.float32), tactic=tactic).max() == 0


def test_every_variant_is_reached():
    reached = set()
    for dtype in NUMPY:
        params = host.UpsampleArgmaxParams(0, 0, 1, 19, 64, 64)
        offered = host.UPSAMPLE_ARGMAX.distinct_tactics(params, dtype)
        assert offered == list(range(1, 13))
        logits = np.zeros((1, 2, 3, 3), NUMPY[dtype])
        labels = np.empty((1, 12, 12), np.int32)
        for tactic in offered:
            params = host.UpsampleArgmaxParams(logits.ctypes.data, labels.ctypes.data, 1, 2, 3, 3)
            reached.add(host.UPSAMPLE_ARGMAX.run(params, dtype, tactic=tactic))
    assert reached == set(host.UPSAMPLE_ARGMAX.variants())


def test_what_the_kernel_cannot_run_is_refused():
    logits = np.zeros((1, 2, 3, 3), np.float32)
    labels = shifted(np.empty((1, 12, 12), np.int32), 1)

    def run(address=logits.ctypes.data, target=labels.ctypes.data - 4, sizes=(1, 2, 3, 3)):
        host.UPSAMPLE_ARGMAX.run(host.UpsampleArgmaxParams(address, target, *sizes), "float32")

    for changed, message in (
        ({"sizes": (1, 0, 3, 3)}, "an empty tensor"),
        ({"sizes": (1, 2, 2**20 + 1, 3)}, "above 1048576"),
        ({"sizes": (1, 2, 2**16, 2**16)}, r"2\^31 logits"),
        ({"address": logits.ctypes.data + 2}, "not aligned"),
        ({"target": labels.ctypes.data}, "not aligned"),
    ):
        with pytest.raises(UserError, match=message):
            run(**changed)
    with pytest.raises(UserError, match=r"logits has shape \(3, 3\): expected four dimensions \(N, classes, H, W\)"):
        host.upsample_argmax(np.zeros((3, 3), np.float32))

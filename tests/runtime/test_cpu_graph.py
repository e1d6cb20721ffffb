# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.runtime.backends import cpu_graph


def conv_model(height, width, *, channels=(128, 128), bias=True, dims=None, **attributes):
    """One 3x3 convolution, and NumPy's weights of it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels[1], channels[0], 3, 3)).astype(np.float32) / 30
    initializers = [numpy_helper.from_array(weight, "w")]
    if bias:
        initializers.append(numpy_helper.from_array(rng.standard_normal(channels[1]).astype(np.float32), "b"))
    attributes = {"pads": [1, 1, 1, 1], **attributes}
    node = helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["c"], name="conv", **attributes)
    relu = helper.make_node("Relu", ["c"], ["y"], name="relu")
    dims = dims or ("batch", height, width)
    shape = lambda count: [dims[0], count, *dims[1:]]  # noqa: E731
    graph = helper.make_graph(
        [node, relu],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape(channels[0]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
        initializers,
        value_info=[helper.make_tensor_value_info("c", TensorProto.FLOAT, shape(channels[1]))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model, **inputs):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_transforms_are_the_identity_of_winograd():
    # y = A^T ((G g) * (B^T d)) is the valid correlation of 6 numbers with 3, exactly.
    back, kernel, forth = cpu_graph.transforms()
    d, g = np.random.default_rng(0).standard_normal((2, 6))
    np.testing.assert_allclose(back @ ((kernel @ g[:3]) * (forth @ d)), np.correlate(d, g[:3], "valid"), atol=1e-13)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [(1, 64, 64), (2, 68, 64)], ids=str)
@pytest.mark.parametrize("dims", [None, ("batch", "height/4", "width/8")], ids=["fixed", "free"])
def test_winograd_equals_the_direct_convolution(size, bias, dims):
    batch, height, width = size
    model = conv_model(height, width, bias=bias, dims=dims)
    x = np.random.default_rng(1).standard_normal((batch, 128, height, width)).astype(np.float32)
    expected = run(model, x=x)
    assert cpu_graph.winograd(model) == 1
    assert not [node for node in model.graph.node if node.name == "conv"]
    onnx.checker.check_model(model)
    assert np.abs(run(model, x=x) - expected).max() <= 5e-6 * np.ptp(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [1, 1, 0, 0]},
        {"dims": ("batch", 66, 64)},
        {"dims": ("batch", 32, 32)},
        {"dims": ("batch", "height/16", "width/16")},
        {"channels": (64, 128)},
    ],
    ids=["stride", "dilation", "padding", "no whole tiles", "small", "free and perhaps odd", "few channels"],
)
def test_winograd_leaves_alone_what_does_not_fit(settings):
    model = conv_model(64, 64, **settings)
    before = model.SerializeToString()
    assert cpu_graph.winograd(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_labels_last_decides_the_same_labels(free):
    dims = ["batch", 5, "height/4", "width/4"] if free else [2, 5, 8, 12]
    nodes = [
        helper.make_node("Relu", ["x"], ["logits"]),
        helper.make_node("Resize", ["logits", "", "s"], ["up"], name="resize", mode="linear"),
        helper.make_node("ArgMax", ["up"], ["a"], axis=1, keepdims=0),
        helper.make_node("Cast", ["a"], ["y"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "labels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None] * 3)],
        [numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    # Whole numbers, many of them zero after Relu: ties must fall the same way.
    x = np.random.default_rng(0).integers(-3, 4, (2, 5, 8, 12)).astype(np.float32)
    expected = run(model, x=x)
    assert cpu_graph.labels_last(model) == 1
    labels = run(model, x=x)
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(labels)) > 2

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import element_types, save
from internimage_deploy.runtime.engine.precision import STATISTICS, convert, to_low
from support.engine_models import (
    DYNAMIC,
    DYNAMIC_LOGITS,
    FLOAT,
    STATIC_LOGITS,
    compute,
    exported,
    graph_of,
    normal,
    single,
    small,
)

HALF = TensorProto.FLOAT16


def run(path, batch):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


@pytest.mark.parametrize("model", [DYNAMIC_LOGITS, STATIC_LOGITS], ids=["dynamic", "static"])
def test_logits_of_the_half_graph_are_near_the_float32_ones(model, tmp_path):
    source = exported(*model)
    graph = graph_of(source)
    convert(graph, "fp16")
    save(graph, tmp_path / "half.onnx")
    onnx.checker.check_model(str(tmp_path / "half.onnx"))
    if model is DYNAMIC_LOGITS:
        batch = np.random.default_rng(1).integers(0, 256, (2, 96, 160, 3), np.uint8)
    else:
        batch = normal(1, 3, 64, 96)
    full, half = run(source, batch), run(tmp_path / "half.onnx", batch)
    assert half.dtype == np.float32
    # 2^-11 is float16's rounding; a few hundred roundings add up to less than this share of the largest logit.
    assert np.abs(half - full).max() < 0.01 * np.abs(full).max()
    # Exact ties are no disagreement: random weights put many pixels within float16's resolution of one.
    strongest = np.sort(full, axis=1)
    clear = strongest[:, -1] - strongest[:, -2] > 0.02 * np.abs(full).max()
    assert clear.mean() > 0.5
    assert (full.argmax(1) == half.argmax(1))[clear].all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_graph_is_strongly_typed(precision):
    """Every node's float inputs agree in type, where its operator has one type for them."""
    graph = graph_of(exported(*DYNAMIC))
    convert(graph, precision)
    types = element_types(graph)
    low = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    low_nodes = set()
    for node in graph.nodes:
        slots = [types[name] for i, name in enumerate(node.input) if name and not (node.op_type == "Resize" and i)]
        floats = {kind for kind in slots if kind in (FLOAT, low)}
        assert node.op_type == "Cast" or len(floats) <= 1, node.name
        if floats == {low}:
            low_nodes.add(node.op_type)
            assert node.op_type not in STATISTICS
    assert {"Conv", "MatMul", "DCNv3"} <= low_nodes


def test_features_are_low_and_statistics_are_not():
    graph = graph_of(exported(*DYNAMIC))
    kept = convert(graph, "fp16")
    types = element_types(graph)
    for node in graph.nodes:
        if node.op_type in ("Conv", "DCNv3"):
            assert types[node.input[0]] == HALF, node.name
        if node.op_type in ("LayerNormalization", "Softmax") or node.name.endswith("psp_modules.0.0/MatMul"):
            assert types[node.output[0]] == FLOAT, node.name
    assert {"LayerNormalization", "decode_head.psp_modules.0.0/MatMul"} <= set(kept)


def test_post_norm_sums_stay_in_float32_and_pre_norm_sums_do_not():
    def sums(model):
        graph = graph_of(exported(*model))
        convert(graph, "fp16")
        types = element_types(graph)
        return {
            types[n.output[0]] for n in graph.nodes if n.op_type == "Add" and n.name.endswith((".1/Add", ".1/Add_1"))
        }

    assert sums(STATIC_LOGITS) == {FLOAT}
    assert sums(DYNAMIC) == {HALF}


def test_inputs_outputs_and_functions_keep_their_types():
    source = exported(*DYNAMIC)
    before = onnx.load(str(source))
    graph = graph_of(source)
    convert(graph, "fp16")
    for old, new in ((before.graph.input, graph.model.graph.input), (before.graph.output, graph.model.graph.output)):
        assert [value.SerializeToString() for value in old] == [value.SerializeToString() for value in new]
    assert before.functions == graph.model.functions


def test_no_value_is_cast_twice():
    graph = graph_of(exported(*DYNAMIC))
    convert(graph, "fp16")
    casts = [(n.input[0], n.attribute[0].i) for n in graph.nodes if n.op_type == "Cast"]
    assert len(casts) == len(set(casts))


def test_a_constant_beyond_float16_stays():
    graph = single("Mul", {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, constants={"huge": np.float32([1e6, 1.0])})
    assert convert(graph, "fp16") == ("it",)
    np.testing.assert_array_equal(compute(graph, x=np.float32([2, 3])), [2e6, 3])
    graph = single("Mul", {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, constants={"huge": np.float32([1e6, 1.0])})
    assert convert(graph, "bf16") == ()


def test_resize_keeps_its_scales():
    graph = single(
        "Resize",
        {"x": (FLOAT, [1, 1, 2, 2])},
        {"y": (FLOAT, [1, 1, 4, 4])},
        constants={"roi": np.float32([]), "scales": np.float32([1, 1, 2, 2])},
        mode="linear",
    )
    convert(graph, "fp16")
    types = element_types(graph)
    (resize,) = (node for node in graph.nodes if node.op_type == "Resize")
    assert [types[name] for name in resize.input] == [HALF, FLOAT, FLOAT]


def test_sizes_turned_into_coordinates_stay_exact():
    """1/3 of a size of 2050, as a sampling coordinate has it, would be off by 0.4 pixels in float16."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Cast", ["shape"], ["real"], "real", to=FLOAT),
        helper.make_node("Div", ["real", "three"], ["y"], "third"),
    ]
    graph = small(nodes, {"x": (FLOAT, [2050])}, {"y": (FLOAT, [1])}, constants={"three": np.float32(3)})
    assert convert(graph, "fp16") == ("real", "third")
    np.testing.assert_array_equal(compute(graph, x=normal(2050)), np.float32([2050]) / np.float32(3))


def test_keep_takes_names_types_and_patterns():
    source = exported(*STATIC_LOGITS)
    graph = graph_of(source)
    kept = convert(graph, "fp16", keep=("decode_head.conv_seg/*", "Relu"))
    assert "decode_head.conv_seg/Conv" in kept
    types = element_types(graph)
    assert {types[node.output[0]] for node in graph.nodes if node.op_type == "Relu"} == {FLOAT}
    with pytest.raises(UserError, match=r"--keep-fp32 nobody\*: no node has this name"):
        convert(graph_of(source), "fp16", keep=("nobody*",))


def test_a_converted_graph_is_refused():
    graph = graph_of(exported(*STATIC_LOGITS))
    convert(graph, "fp16")
    with pytest.raises(UserError, match="converts float32 models"):
        convert(graph, "fp16")


def test_external_weights_pass_through(tmp_path):
    source = exported(*STATIC_LOGITS)
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(str(source)), str(apart), save_as_external_data=True, location="weights", size_threshold=0)
    graph = graph_of(apart)
    convert(graph, "fp16")
    save(graph, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx.data").stat().st_size < 0.6 * (tmp_path / "weights").stat().st_size
    batch = normal(1, 3, 64, 96)
    full, half = run(source, batch), run(tmp_path / "half.onnx", batch)
    assert np.abs(half - full).max() < 0.01 * np.abs(full).max()


def test_bfloat16_rounds_to_the_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.concatenate([normal(1000, scale=100), np.float32([0, -0.0, np.inf, -np.inf, 1e-40, 3.3e38])])
    np.testing.assert_array_equal(
        to_low(values, TensorProto.BFLOAT16).view(ml_dtypes.bfloat16).astype(np.float32),
        values.astype(ml_dtypes.bfloat16).astype(np.float32),
    )
    assert np.isnan(to_low(np.float32([np.nan]), TensorProto.BFLOAT16).view(ml_dtypes.bfloat16).astype(np.float32))

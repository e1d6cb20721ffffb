# SPDX-License-Identifier: Apache-2.0
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from internimage_deploy.exporter.models import dcnv3
from internimage_deploy.operators import contract
from internimage_deploy.operators.onnx_function import dcnv3_function
from support import golden

_ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def one_node_model(attributes, *, opset=17, dtype="float32"):
    """A model of one DCNv3 node whose sizes are all free."""
    node = helper.make_node("DCNv3", contract.INPUTS, contract.OUTPUTS, domain=contract.DOMAIN, **attributes)
    channels = attributes["group"] * attributes["group_channels"]
    points = attributes["group"] * attributes.get("kernel_h", 3) * attributes.get("kernel_w", 3)
    widths = {"input": channels, "offset": 2 * points, "mask": points, "output": channels}
    infos = {
        name: helper.make_tensor_value_info(name, _ONNX_TYPES[dtype], [None, None, None, width])
        for name, width in widths.items()
    }
    output = infos.pop("output")
    return helper.make_model(
        helper.make_graph([node], "one_node", list(infos.values()), [output]),
        functions=[dcnv3_function(opset, mask_softmax=bool(attributes.get("mask_softmax", 0)))],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)],
        ir_version=9,
    )


def run(model, *inputs):
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(contract.INPUTS, inputs, strict=True)))[0]


def attributes_of(case):
    pairs = {f"{name}_{axis}": case[name] for name in ("kernel", "stride", "pad", "dilation") for axis in "hw"}
    return pairs | {key: case[key] for key in ("group", "group_channels", "offset_scale")}


@pytest.mark.parametrize("opset", [16, 17, 20])
@pytest.mark.parametrize("name", sorted(golden.case("dcnv3_op")))
def test_function_equals_the_official_operator(name, opset):
    data = golden.arrays("dcnv3_op")
    model = one_node_model(attributes_of(golden.case("dcnv3_op")[name]), opset=opset)
    output = run(model, *(data[f"{name}.{part}"] for part in contract.INPUTS))
    np.testing.assert_allclose(output, data[f"{name}.output"], atol=1e-5, rtol=0)


@st.composite
def settings_and_sizes(draw):
    small = st.integers(1, 3)
    values = {
        name: draw(strategy)
        for name, strategy in {
            "kernel_h": st.integers(1, 4),
            "kernel_w": st.integers(1, 4),
            "stride_h": small,
            "stride_w": small,
            "pad_h": st.integers(0, 3),
            "pad_w": st.integers(0, 3),
            "dilation_h": small,
            "dilation_w": small,
            "group": small,
            "group_channels": st.integers(1, 5),
            "mask_softmax": st.integers(0, 1),
        }.items()
    }
    values["offset_scale"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
    sizes = []
    for axis in "hw":
        reach = values[f"dilation_{axis}"] * (values[f"kernel_{axis}"] - 1) + 1
        sizes.append(draw(st.integers(max(1, reach - 2 * values[f"pad_{axis}"]), 12)))
    return values, draw(st.integers(1, 3)), *sizes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(settings_and_sizes(), st.integers(0, 2**31))
def test_function_equals_pytorch_under_any_settings(case, seed):
    values, batch, height, width = case
    out_h, out_w = (
        contract.output_size(size, *(values[f"{name}_{axis}"] for name in ("kernel", "stride", "pad", "dilation")))
        for size, axis in ((height, "h"), (width, "w"))
    )
    points = values["group"] * values["kernel_h"] * values["kernel_w"]
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, values["group"] * values["group_channels"]), np.float32)
    offset = 2 * rng.standard_normal((batch, out_h, out_w, 2 * points), np.float32)
    mask = rng.standard_normal((batch, out_h, out_w, points), np.float32)
    expected = dcnv3(
        *map(torch.from_numpy, (x, offset, mask)),
        **{name: (values[f"{name}_h"], values[f"{name}_w"]) for name in ("kernel", "stride", "pad", "dilation")},
        group=values["group"],
        offset_scale=values["offset_scale"],
        mask_softmax=bool(values["mask_softmax"]),
    )
    np.testing.assert_allclose(run(one_node_model(values), x, offset, mask), expected.numpy(), atol=1e-4, rtol=0)


def test_half_precision_is_rounded_only_at_the_ends():
    # At width 2048 a half-precision coordinate would be up to half a pixel off.
    rng = np.random.default_rng(0)
    values = {"group": 2, "group_channels": 4}
    x, offset, mask = (rng.standard_normal((1, 3, 2048, width)).astype(np.float16) for width in (8, 36, 18))
    output = run(one_node_model(values, dtype="float16"), x, offset, mask)
    expected = dcnv3(*(torch.from_numpy(part).double() for part in (x, offset, mask)), group=2).numpy()
    assert output.dtype == np.float16
    # Half a unit in the last place of the result, and what 1e-4 pixels (float32 at this width) change.
    np.testing.assert_allclose(output.astype(np.float32), expected, rtol=2**-11, atol=1e-3)


def test_function_declares_the_contract():
    function = dcnv3_function(17)
    assert (function.domain, function.name) == (contract.DOMAIN, contract.OP_TYPE)
    assert tuple(function.input) == contract.INPUTS
    assert tuple(function.output) == contract.OUTPUTS
    defaults = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
    assert set(function.attribute) == {a.name for a in contract.ATTRIBUTES if a.default is None}
    assert defaults == {a.name: a.default for a in contract.ATTRIBUTES if a.default is not None}


def test_function_needs_gridsample():
    with pytest.raises(ValueError, match="opset 15 has no GridSample"):
        dcnv3_function(15)

# SPDX-License-Identifier: Apache-2.0
"""Both plugin classes, driven as TensorRT drives them (cpp/driver.cpp), with the DCNv3 kernel on the host."""

from __future__ import annotations

import numpy as np
import pytest

from internimage_deploy.operators import contract
from internimage_deploy.trt_plugins import host
from support import golden
from support.plugin_driver import HALF, TYPES

BASE = {"group": 2, "group_channels": 4}


def shapes_of(height=6, width=7, batch=2, *, group=2, channels=4, kernel=3):
    points = group * kernel * kernel
    image = (batch, height, width)
    return [(*image, group * channels), (*image, 2 * points), (*image, points), (*image, group * channels)]


def packed(operands):
    """Offsets and mask in one tensor."""
    return [operands[0], np.concatenate(operands[1:], -1)]


def golden_operands(name, dtype):
    case = golden.case("dcnv3_op")[name]
    arrays = golden.arrays("dcnv3_op")
    attributes = {"group": case["group"], "group_channels": case["group_channels"]}
    attributes["offset_scale"] = float(case["offset_scale"])
    for key in ("kernel", "stride", "pad", "dilation"):
        attributes |= {f"{key}_h": case[key], f"{key}_w": case[key]}
    operands = [np.ascontiguousarray(arrays[f"{name}.{part}"].astype(dtype)) for part in ("input", "offset", "mask")]
    return attributes, operands, arrays[f"{name}.output"]


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("creator", ["DCNv3", "DCNv3Packed", "TRTDCNv3"])
@pytest.mark.parametrize("name", list(golden.case("dcnv3_op")))
def test_computes_the_golden_cases_also_when_cloned_and_reloaded(driver, name, creator, dtype):
    _, numpy_type = TYPES[dtype]
    attributes, operands, expected = golden_operands(name, numpy_type)
    if creator == contract.PACKED_OP_TYPE:
        operands = packed(operands)
    plugin = driver.create(creator, **attributes)
    clone = driver.keep(driver.call("clone", plugin))
    reloaded = driver.keep(driver.call("reload", clone, 0))
    tolerance = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}[dtype]
    results = []
    for each in (plugin, clone, reloaded):
        assert driver.call("name", each).decode() == creator
        output = np.full(expected.shape, np.nan, numpy_type)
        assert driver.enqueue(each, operands, output) == 0, driver.log()
        results.append(output.astype(np.float32))
    np.testing.assert_allclose(results[0], expected, atol=tolerance)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("creator", ["DCNv3", "DCNv3Packed"])
def test_every_attribute_reaches_the_kernel(driver, creator):
    # All different, so that no two can be swapped unseen.
    attributes = {
        "kernel_h": 2, "kernel_w": 3, "stride_h": 3, "stride_w": 2, "pad_h": 4, "pad_w": 1, "dilation_h": 2,
        "dilation_w": 4, "group": 3, "group_channels": 5, "offset_scale": 1.25, "mask_softmax": 1,
        "allow_half": 1,
    }  # fmt: skip
    assert set(attributes) == {a.name for a in contract.PLUGIN_ATTRIBUTES}
    op = {key: (attributes[f"{key}_h"], attributes[f"{key}_w"]) for key in ("kernel", "stride", "pad", "dilation")}
    sides = [contract.output_size(s, *(op[k][i] for k in op)) for i, s in enumerate((9, 17))]
    rng = np.random.default_rng(0)
    operands = [
        rng.standard_normal((2, 9, 17, 15), np.float32),
        rng.standard_normal((2, *sides, 36), np.float32),
        rng.standard_normal((2, *sides, 18), np.float32),
    ]
    expected = host.dcnv3(*operands, group=3, offset_scale=1.25, mask_softmax=True, **op)
    if creator == contract.PACKED_OP_TYPE:
        operands = packed(operands)
    plugin = driver.create(creator, **attributes)
    reloaded = driver.keep(driver.call("reload", plugin, 0))
    for each in (plugin, reloaded):
        output = np.full_like(expected, np.nan)
        assert driver.enqueue(each, operands, output) == 0, driver.log()
        np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (31, 32), (223, 1024)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", [1, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_shape_is_exact_for_dynamic_inputs(driver, size, stride, pad, dilation):
    settings = {"stride_h": stride, "stride_w": stride + 1, "pad_h": pad + 1, "pad_w": pad,
                "dilation_h": dilation, "dilation_w": 1, "kernel_h": 3, "kernel_w": 2}  # fmt: skip
    plugin = driver.create(**settings, **BASE)
    shapes = [(7, *size, 8), (7, 1, 1, 1), (7, 1, 1, 1)]
    expected = [contract.output_size(s, *(settings[f"{k}_{a}"] for k in ("kernel", "stride", "pad", "dilation")))
                for s, a in zip(size, "hw", strict=True)]  # fmt: skip
    assert driver.output_shape(plugin, shapes) == (7, *expected, 8)
    assert driver.log() == ""  # the stand-in reports negative constants


def test_a_blob_of_the_packed_plugin_is_reloaded_as_one(v2):
    plugin = v2.create(contract.PACKED_OP_TYPE, **BASE)
    assert v2.call("name", v2.keep(v2.call("reload", plugin, 0))).decode() == contract.PACKED_OP_TYPE
    assert v2.call("reload", plugin, 2) is None
    assert "bytes in the engine are not this plugin's" in v2.log()


@pytest.mark.parametrize(("major", "reached"), [(8, True), (10, True), (11, True), (12, False)])
def test_messages_reach_the_logger_of_every_tensorrt_whose_classes_are_known(driver, major, reached):
    driver.lib.driver_start_as(major)
    try:
        assert driver.create(group=2) is None
        message = "DCNv3 'layer7': attribute group_channels is missing and has no default\n"
        assert driver.log() == (message if reached else "")
    finally:
        driver.lib.driver_start_as(10)


def test_field_names_are_the_contract(driver):
    names = {a.name for a in contract.PLUGIN_ATTRIBUTES}
    assert driver.field_names("DCNv3") == names
    assert driver.field_names("DCNv3Packed") == names
    assert driver.field_names("TRTDCNv3") == names | {"im2col_step"}


def test_defaults_are_the_contract(driver):
    defaults = {a.name: a.default for a in contract.PLUGIN_ATTRIBUTES if a.default is not None}
    op = {k: defaults[f"{k}_h"] for k in ("kernel", "stride", "pad", "dilation")}
    rng = np.random.default_rng(1)
    operands = [rng.standard_normal(shape, np.float32) for shape in shapes_of()[:3]]
    expected = host.dcnv3(*operands, group=2, offset_scale=defaults["offset_scale"], **op)
    output = np.empty_like(expected)
    assert driver.enqueue(driver.create(**BASE), operands, output) == 0
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("attribute", contract.PLUGIN_ATTRIBUTES, ids=lambda a: a.name)
def test_out_of_range_and_mistyped_attributes_are_refused_by_name(driver, attribute):
    def refused(value, kind=None, length=None):
        given = BASE | {attribute.name: value}
        types = {} if kind is None else {attribute.name: kind}
        lengths = {} if length is None else {attribute.name: length}
        assert driver.create(types=types, lengths=lengths, **given) is None
        message = driver.log()
        assert f"'layer7': {attribute.name}" in message, message

    if attribute.type == "int":
        refused(attribute.minimum - 1)
        refused(attribute.minimum - 1, "int64")
        refused(2**33 + 1, "int64")
        if attribute.maximum is not None:
            refused(attribute.maximum + 1)
        for wrong in ("float32", "float64", "int8", "int16", "float16"):
            refused(1, wrong)
    else:
        refused(1, "int32")
        refused(1, "int64")
        for value in (float("nan"), float("inf"), 1e300):
            refused(value, "float64")
    refused([1, 1])
    refused(None)
    refused(None, length=1)


@pytest.mark.parametrize("attribute", contract.PLUGIN_ATTRIBUTES, ids=lambda a: a.name)
def test_integers_come_as_32_or_64_bits_and_floats_too(driver, attribute):
    value = max(attribute.minimum or 0, 1)
    for kind in ("int32", "int64") if attribute.type == "int" else ("float32", "float64"):
        assert driver.create(types={attribute.name: kind}, **(BASE | {attribute.name: value})), driver.log()


def test_missing_and_unknown_attributes_are_refused_by_name(driver):
    assert driver.create(group=2) is None
    assert "group_channels is missing" in driver.log()
    assert driver.create(group_channels=2) is None
    assert "group is missing" in driver.log()
    assert driver.create(**BASE, stride=2) is None
    assert "unknown attribute 'stride'" in driver.log()
    assert driver.create_from_nothing("DCNv3") is None
    assert "no attributes" in driver.log()


def test_official_extras_are_ignored(driver):
    assert driver.create("TRTDCNv3", **BASE, im2col_step=256)
    assert driver.log() == ""


@pytest.mark.parametrize(
    ("attributes", "shape", "message"),
    [
        ({"dilation_h": 4}, (2, 6, 7, 8), "exceeds the padded height"),
        ({"kernel_w": 10}, (2, 6, 7, 8), "exceeds the padded width"),
        ({}, (1, 1, 2**21, 8), "width with padding is above 2097152"),
        ({}, (6, 7, 8), "input must have 4 dimensions"),
    ],
    ids=["dilation", "kernel", "too wide", "rank"],
)
def test_impossible_inputs_are_refused(driver, attributes, shape, message):
    plugin = driver.create(**BASE, **attributes)
    driver.configure(plugin, [shape, (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)], HALF)
    assert message in driver.log()


def test_a_wrong_number_of_tensors_is_refused(driver):
    plugin = driver.create(**BASE)
    driver.configure(plugin, shapes_of(), HALF, 2)
    assert "2 inputs" in driver.log()


def test_unknown_dimensions_are_accepted_while_configuring(driver):
    plugin = driver.create(**BASE)
    shapes = [(-1, -1, -1, s[3]) for s in shapes_of()]
    assert driver.configure(plugin, shapes, HALF) == 0
    assert driver.log() == ""
    shapes[2] = (-1, -1, -1, 17)
    driver.configure(plugin, shapes, HALF)
    assert "mask has 17 in dimension 3: expected 18" in driver.log()


def test_an_engine_with_an_attribute_out_of_range_is_refused(v2):
    assert v2.call("reload", v2.create(**BASE), 3) is None
    assert "kernel_h" in v2.log()


def test_equal_tactics_are_offered_once(v3):
    plugin = v3.create(**BASE)  # four channels per group: no pairs of vectors
    v3.configure(plugin, shapes_of(32, 64), HALF)
    assert len(v3.tactics(plugin)) == 6


def test_timing_cache_id_tells_attributes_apart(v3):
    def identity(**changed):
        return v3.call("timing_id", v3.create(**(BASE | changed))).decode()

    base = identity()
    assert base != v3.call("timing_id", v3.create(contract.PACKED_OP_TYPE, **BASE)).decode()
    integers = [a for a in contract.PLUGIN_ATTRIBUTES if a.type == "int"]
    changes = [identity(**{a.name: 7 if a.maximum is None else 1}) for a in integers]
    assert len({base, identity(offset_scale=2.0), identity(offset_scale=1.0000001), *changes}) == len(changes) + 3
    assert identity() == base

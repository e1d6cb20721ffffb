# SPDX-License-Identifier: Apache-2.0
"""Both plugin classes, driven as TensorRT drives them (cpp/driver.cpp), with the DCNv3 kernel on the host."""

from __future__ import annotations

import numpy as np
import pytest

from internimage_deploy.operators import contract
from internimage_deploy.trt_plugins import host
from support import golden
from support.plugin_driver import BF16, CHW4, FLOAT, HALF, INT8, INVALID_VALUE, LINEAR, TYPES

BASE = {"group": 2, "group_channels": 4}


def shapes_of(height=6, width=7, batch=2, *, group=2, channels=4, kernel=3):
    points = group * kernel * kernel
    image = (batch, height, width)
    return [(*image, group * channels), (*image, 2 * points), (*image, points), (*image, group * channels)]


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
@pytest.mark.parametrize("creator", ["DCNv3", "TRTDCNv3"])
@pytest.mark.parametrize("name", list(golden.case("dcnv3_op")))
def test_computes_the_golden_cases_also_when_cloned_and_reloaded(driver, name, creator, dtype):
    _, numpy_type = TYPES[dtype]
    attributes, operands, expected = golden_operands(name, numpy_type)
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


def test_every_attribute_reaches_the_kernel(driver):
    # All different, so that no two can be swapped unseen.
    attributes = {
        "kernel_h": 2, "kernel_w": 3, "stride_h": 3, "stride_w": 2, "pad_h": 4, "pad_w": 1, "dilation_h": 2,
        "dilation_w": 4, "group": 3, "group_channels": 5, "offset_scale": 1.25, "mask_softmax": 1,
    }  # fmt: skip
    assert set(attributes) == {a.name for a in contract.ATTRIBUTES}
    op = {key: (attributes[f"{key}_h"], attributes[f"{key}_w"]) for key in ("kernel", "stride", "pad", "dilation")}
    sides = [contract.output_size(s, *(op[k][i] for k in op)) for i, s in enumerate((9, 17))]
    rng = np.random.default_rng(0)
    operands = [
        rng.standard_normal((2, 9, 17, 15), np.float32),
        rng.standard_normal((2, *sides, 36), np.float32),
        rng.standard_normal((2, *sides, 18), np.float32),
    ]
    expected = host.dcnv3(*operands, group=3, offset_scale=1.25, mask_softmax=True, **op)
    plugin = driver.create(**attributes)
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


def test_output_shape_refuses_other_ranks_and_counts(driver):
    plugin = driver.create(**BASE)
    assert driver.output_shape(plugin, [(1, 1, 1)] * 3) is None
    assert "input must have 4 dimensions" in driver.log()
    assert driver.output_shape(plugin, [(1, 1, 1, 1)] * 2) is None
    assert "got 2 inputs and 1 outputs: expected 3 inputs (input, offset, mask) and 1 output" in driver.log()


@pytest.mark.parametrize("major", [8, 10, 11])
def test_messages_reach_the_logger_of_every_tensorrt(driver, major):
    driver.lib.driver_start_as(major)
    try:
        assert driver.create(group=2) is None
        assert driver.log() == "DCNv3 'layer7': attribute group_channels is missing and has no default\n"
    finally:
        driver.lib.driver_start_as(10)


def test_a_tensorrt_of_unknown_classes_gets_no_messages(driver):
    driver.lib.driver_start_as(12)
    try:
        assert driver.create(group=2) is None
        assert driver.log() == ""
    finally:
        driver.lib.driver_start_as(10)


def test_formats_are_linear_of_one_floating_type(driver):
    plugin = driver.create(**BASE)

    def supported(position, types, formats=(LINEAR,) * 4, counts=(3, 1)):
        return driver.supports(plugin, position, types, formats, *counts)

    for code, _ in TYPES.values():
        assert all(supported(position, (code,) * 4) for position in range(4))
    assert not supported(0, (INT8,) * 4)
    for position in (1, 2, 3):
        types = [HALF] * 4
        types[position] = FLOAT
        assert not supported(position, types)
    for position in range(4):
        formats = [LINEAR] * 4
        formats[position] = CHW4
        assert not supported(position, (HALF,) * 4, formats)
    assert not supported(0, (HALF,) * 4, counts=(4, 1))
    assert not supported(0, (HALF,) * 4, counts=(3, 2))
    assert [driver.call("output_type", plugin, code, 3) for code in (FLOAT, HALF, BF16)] == [FLOAT, HALF, BF16]


def test_field_names_are_the_contract(driver):
    names = {a.name for a in contract.ATTRIBUTES}
    assert driver.field_names("DCNv3") == names
    assert driver.field_names("TRTDCNv3") == names | {"im2col_step"}


def test_defaults_are_the_contract(driver):
    defaults = {a.name: a.default for a in contract.ATTRIBUTES if a.default is not None}
    op = {k: defaults[f"{k}_h"] for k in ("kernel", "stride", "pad", "dilation")}
    rng = np.random.default_rng(1)
    operands = [rng.standard_normal(shape, np.float32) for shape in shapes_of()[:3]]
    expected = host.dcnv3(*operands, group=2, offset_scale=defaults["offset_scale"], **op)
    output = np.empty_like(expected)
    assert driver.enqueue(driver.create(**BASE), operands, output) == 0
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("attribute", contract.ATTRIBUTES, ids=lambda a: a.name)
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


@pytest.mark.parametrize("attribute", contract.ATTRIBUTES, ids=lambda a: a.name)
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


BAD_SHAPES = {
    "channels": (0, 3, 9, "input has 9 in dimension 3: expected 8"),
    "offset height": (1, 1, 5, "offset has 5 in dimension 1: expected 6"),
    "offset depth": (1, 3, 18, "offset has 18 in dimension 3: expected 36"),
    "mask batch": (2, 0, 1, "mask has 1 in dimension 0: expected 2"),
    "mask depth": (2, 3, 9, "mask has 9 in dimension 3: expected 18"),
    "output width": (3, 2, 9, "output has 9 in dimension 2: expected 7"),
}


@pytest.mark.parametrize(("tensor", "dimension", "value", "message"), BAD_SHAPES.values(), ids=list(BAD_SHAPES))
def test_bad_shapes_are_refused_with_all_shapes(driver, tensor, dimension, value, message):
    shapes = [list(s) for s in shapes_of()]
    shapes[tensor][dimension] = value
    plugin = driver.create(**BASE)

    status = driver.configure(plugin, shapes, HALF)
    log = driver.log()
    assert message in log
    assert "mask (" in log
    assert "'layer7'" in log
    if driver.interface == "v3":
        assert status != 0
        assert driver.shape_change(plugin, shapes, HALF) != 0
        assert message in driver.log()
    operands = [np.zeros(shape, np.float16) for shape in shapes_of()[:3]]
    output = np.zeros(shapes_of()[3], np.float16)
    assert driver.enqueue(plugin, operands, output, shapes) == INVALID_VALUE
    assert message in driver.log()


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


def test_an_empty_batch_is_no_launch(driver):
    plugin = driver.create(**BASE)
    shapes = shapes_of(batch=0)
    operands = [np.zeros(shape, np.float32) for shape in shapes[:3]]
    driver.lib.driver_fail_launches(INVALID_VALUE)
    assert driver.enqueue(plugin, operands, np.zeros(shapes[3], np.float32)) == 0


def test_a_failed_launch_is_reported_with_shapes(driver):
    plugin = driver.create(**BASE)
    operands = [np.zeros(shape, np.float32) for shape in shapes_of()[:3]]
    driver.lib.driver_fail_launches(701)  # cudaErrorLaunchOutOfResources
    assert driver.enqueue(plugin, operands, np.zeros(shapes_of()[3], np.float32)) == 701
    log = driver.log()
    assert "too many resources" in log
    assert "input (2, 6, 7, 8)" in log


@pytest.mark.parametrize("damage", [1, 2, 3], ids=["short", "other tag", "out of range"])
def test_damaged_engines_are_refused(v2, damage):
    assert v2.call("reload", v2.create(**BASE), damage) is None
    assert ("rebuild the engine" if damage < 3 else "kernel_h") in v2.log()


def test_tactics_are_offered_set_cloned_and_used(v3):
    plugin = v3.create(**(BASE | {"group_channels": 16}))
    shapes = shapes_of(32, 64, channels=16)
    assert v3.configure(plugin, shapes, HALF) == 0
    offered = v3.tactics(plugin)
    assert len(set(offered)) == len(offered) == 12
    assert 0 not in offered
    operands = [np.ones(shape, np.float16) for shape in shapes[:3]]
    results = []
    for tactic in (0, *offered):
        assert v3.call("set_tactic", plugin, tactic) == 0
        clone = v3.keep(v3.call("clone", plugin))
        output = np.empty(shapes[3], np.float16)
        assert v3.enqueue(clone, operands, output) == 0
        assert v3.lib.driver_last_tactic() == tactic
        results.append(output)
    assert all(np.array_equal(results[0], other) for other in results)
    for tactic in (-1, 13):
        assert v3.call("set_tactic", plugin, tactic) != 0
        assert "does not exist" in v3.log()


def test_equal_tactics_are_offered_once(v3):
    plugin = v3.create(**BASE)  # four channels per group: no pairs of vectors
    v3.configure(plugin, shapes_of(32, 64), HALF)
    assert len(v3.tactics(plugin)) == 6


def test_timing_cache_id_tells_attributes_apart(v3):
    def identity(**changed):
        return v3.call("timing_id", v3.create(**(BASE | changed))).decode()

    base = identity()
    changes = [identity(**{a.name: 7 if a.maximum is None else 1}) for a in contract.ATTRIBUTES if a.type == "int"]
    assert len({base, identity(offset_scale=2.0), identity(offset_scale=1.0000001), *changes}) == len(changes) + 3
    assert identity() == base

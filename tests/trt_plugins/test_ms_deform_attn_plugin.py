# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn in both plugin classes, driven as TensorRT drives them (cpp/driver.cpp), with the kernel on the host."""

from __future__ import annotations

import numpy as np
import pytest

from internimage_deploy.operators import ms_deform_attn as contract
from support.ms_deform_attn_cases import GOLDEN, golden_case, stored
from support.plugin_driver import FLOAT, HALF, INT32, INVALID_VALUE, TYPES

NAME = contract.OP_TYPE


def types(code):
    """Of the five inputs and the output."""
    return [code, INT32, INT32, FLOAT, code, code]


def shapes_of(batch=2, keys=15, queries=7, heads=2, channels=8, levels=1, points=4):
    places = (batch, queries, heads, levels, points)
    value, output = (batch, keys, heads, channels), (batch, queries, heads * channels)
    return [value, (levels, 2), (levels,), (*places, 2), places, output]


def ready(operands, dtype="float32"):
    """The operands as the plugin takes them."""
    value, shapes, starts, locations, weights = stored(operands, dtype)
    return [value, shapes.astype(np.int32), starts.astype(np.int32), locations, weights]


def empty_output(operands):
    value, locations = operands[0], operands[3]
    return np.full((len(value), locations.shape[1], value.shape[2] * value.shape[3]), np.nan, value.dtype)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("name", GOLDEN)
def test_computes_the_golden_cases_also_when_cloned_and_reloaded(driver, name, dtype):
    operands, expected = golden_case(name)
    operands = ready(operands, dtype)
    plugin = driver.create(NAME)
    clone = driver.keep(driver.call("clone", plugin))
    reloaded = driver.keep(driver.call("reload", clone, 0))
    tolerance = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1.5e-1}[dtype]
    results = []
    for each in (plugin, clone, reloaded):
        assert driver.call("name", each).decode() == NAME
        output = empty_output(operands)
        assert driver.enqueue(each, operands, output) == 0, driver.log()
        results.append(output.astype(np.float32))
    np.testing.assert_allclose(results[0], expected, atol=tolerance)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("sizes", [{}, {"batch": 5, "queries": 1, "heads": 32, "channels": 3, "levels": 4}], ids=str)
def test_output_shape_follows_dynamic_inputs(driver, sizes):
    *inputs, output = shapes_of(**sizes)
    assert driver.output_shape(driver.create(NAME), inputs) == output


def test_there_are_no_attributes(driver):
    assert driver.field_names(NAME) == set()
    assert driver.create(NAME, im2col_step=64) is None
    assert "MSDeformAttn 'layer7': unknown attribute 'im2col_step'" in driver.log()
    assert driver.create(NAME, types={"plugin_version": "int8"}, plugin_version=49)
    assert driver.create_from_nothing(NAME)
    assert driver.log() == ""


def test_unknown_dimensions_are_accepted_while_configuring(driver):
    plugin = driver.create(NAME)
    shapes = [(-1, -1, 2, 8), (-1, 2), (-1,), (-1, -1, 2, 3, 4, 2), (-1, -1, 2, 3, 4), (-1, -1, 16)]
    assert driver.configure(plugin, shapes, types(HALF)) == 0
    assert driver.configure(plugin, [tuple(-1 for _ in s) for s in shapes], types(HALF)) == 0
    assert driver.log() == ""
    shapes[2] = (2,)
    driver.configure(plugin, shapes, types(HALF))
    assert "level_start_index has 2 in dimension 0: expected 3" in driver.log()


def test_an_empty_output_is_no_launch(driver):
    plugin = driver.create(NAME)
    driver.lib.driver_fail_launches(INVALID_VALUE)
    for sizes in ({"batch": 0}, {"queries": 0}):
        *inputs, output = shapes_of(**sizes)
        kinds = (np.float32, np.int32, np.int32, np.float32, np.float32)
        operands = [np.zeros(shape, kind) for shape, kind in zip(inputs, kinds, strict=True)]
        assert driver.enqueue(plugin, operands, np.zeros(output, np.float32)) == 0

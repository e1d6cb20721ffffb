# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn in both plugin classes, driven as TensorRT drives them (cpp/driver.cpp), with the kernel on the host."""

from __future__ import annotations

import numpy as np
import pytest

from internimage_deploy.operators import ms_deform_attn as contract
from support.ms_deform_attn_cases import GOLDEN, draw, golden_case, stored
from support.plugin_driver import BF16, CHW4, FLOAT, HALF, INT32, INVALID_VALUE, LINEAR, TYPES

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


def test_output_shape_refuses_other_ranks_and_counts(driver):
    plugin = driver.create(NAME)
    inputs = shapes_of()[:-1]
    assert driver.output_shape(plugin, inputs[:4]) is None
    assert f"got 4 inputs and 1 outputs: expected 5 inputs ({', '.join(contract.INPUTS)}) and 1 output" in driver.log()
    for index, (name, shape) in enumerate(zip(contract.INPUTS, inputs, strict=True)):
        assert driver.output_shape(plugin, [*inputs[:index], (*shape, 1), *inputs[index + 1 :]]) is None
        assert f"{name} must have {len(shape)} dimensions, and has {len(shape) + 1}" in driver.log()


def test_types_and_formats(driver):
    plugin = driver.create(NAME)

    def supported(position, codes, formats=(LINEAR,) * 6, inputs=5, outputs=1):
        return driver.supports(plugin, position, codes, formats, inputs, outputs)

    every = (FLOAT, HALF, BF16, INT32, 2, 8)  # and INT8, INT64
    for code, _ in TYPES.values():
        assert all(supported(position, types(code)) for position in range(6))
        for position in range(6):
            taken = set()
            for other in every:
                codes = types(code)
                codes[position] = other
                if supported(position, codes):
                    taken.add(other)
            assert taken == ({FLOAT, HALF, BF16} if position == 0 else {types(code)[position]})
    for position in range(6):
        formats = [LINEAR] * 6
        formats[position] = CHW4
        assert not supported(position, types(HALF), formats)
    assert not supported(0, types(HALF), inputs=6)
    assert not supported(0, types(HALF), outputs=2)
    assert [driver.call("output_type", plugin, code, 5) for code in (FLOAT, HALF, BF16)] == [FLOAT, HALF, BF16]


def test_there_are_no_attributes(driver):
    assert driver.field_names(NAME) == set()
    assert driver.create(NAME, im2col_step=64) is None
    assert "MSDeformAttn 'layer7': unknown attribute 'im2col_step'" in driver.log()
    assert driver.create(NAME, types={"plugin_version": "int8"}, plugin_version=49)
    assert driver.create_from_nothing(NAME)
    assert driver.log() == ""


BAD_SHAPES = {
    "pairs": (1, 1, 3, "spatial_shapes has 3 in dimension 1: expected 2"),
    "starts": (2, 0, 2, "level_start_index has 2 in dimension 0: expected 1"),
    "batch": (3, 0, 1, "sampling_locations has 1 in dimension 0: expected 2"),
    "heads": (3, 2, 3, "sampling_locations has 3 in dimension 2: expected 2"),
    "levels": (3, 3, 2, "sampling_locations has 2 in dimension 3: expected 1"),
    "x and y": (3, 5, 3, "sampling_locations has 3 in dimension 5: expected 2"),
    "queries": (4, 1, 8, "attention_weights has 8 in dimension 1: expected 7"),
    "weights' levels": (4, 3, 3, "attention_weights has 3 in dimension 3: expected 1"),
    "points": (4, 4, 8, "attention_weights has 8 in dimension 4: expected 4"),
    "output's queries": (5, 1, 8, "output has 8 in dimension 1: expected 7"),
    "channels": (5, 2, 8, "output has 8 in dimension 2: expected 16"),
}


@pytest.mark.parametrize(("tensor", "dimension", "size", "message"), BAD_SHAPES.values(), ids=list(BAD_SHAPES))
def test_bad_shapes_are_refused_with_all_shapes(driver, tensor, dimension, size, message):
    shapes = [list(s) for s in shapes_of()]
    shapes[tensor][dimension] = size
    plugin = driver.create(NAME)
    status = driver.configure(plugin, shapes, types(HALF))
    log = driver.log()
    assert message in log
    assert "attention_weights (" in log
    assert "MSDeformAttn 'layer7'" in log
    if driver.interface == "v3":
        assert status != 0
        assert driver.shape_change(plugin, shapes, types(HALF)) != 0
        assert message in driver.log()
    operands = ready(draw(1, batch=2), "float16")
    assert driver.enqueue(plugin, operands, empty_output(operands), shapes) == INVALID_VALUE
    assert message in driver.log()


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


def test_a_failed_launch_is_reported_with_shapes(driver):
    plugin = driver.create(NAME)
    operands = ready(draw(1))
    driver.lib.driver_fail_launches(701)  # cudaErrorLaunchOutOfResources
    assert driver.enqueue(plugin, operands, empty_output(operands)) == 701
    log = driver.log()
    assert "too many resources" in log
    assert "value (1, 15, 2, 8), spatial_shapes (1, 2)" in log


@pytest.mark.parametrize("damage", [1, 2], ids=["short", "other tag"])
def test_damaged_engines_are_refused(v2, damage):
    assert v2.call("reload", v2.create(NAME), damage) is None
    assert "rebuild the engine" in v2.log()


def test_tactics_are_offered_set_cloned_and_used(v3):
    plugin = v3.create(NAME)
    operands = ready(draw(3, queries=200, channels=32, heads=4), "float16")
    results = [empty_output(operands)]
    assert len(v3.tactics(plugin)) == 12
    assert v3.configure(plugin, [a.shape for a in (*operands, results[0])], types(HALF)) == 0
    offered = v3.tactics(plugin)
    assert len(set(offered)) == len(offered) == 6  # tiles of one and of four rows are the same
    for tactic in (0, *offered):
        assert v3.call("set_tactic", plugin, tactic) == 0
        clone = v3.keep(v3.call("clone", plugin))
        output = empty_output(operands)
        assert v3.enqueue(clone, operands, output) == 0
        assert v3.lib.driver_last_tactic() == tactic
        results.append(output)
    assert all(np.array_equal(results[1], other) for other in results[1:])
    for tactic in (-1, 13):
        assert v3.call("set_tactic", plugin, tactic) != 0
        assert "does not exist" in v3.log()


def test_the_timing_cache_tells_the_plugins_apart(v3):
    own = v3.call("timing_id", v3.create(NAME))
    assert own == v3.call("timing_id", v3.create(NAME))
    assert own != v3.call("timing_id", v3.create("DCNv3", group=1, group_channels=1))

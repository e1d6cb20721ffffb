# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator in both plugin classes, driven as TensorRT drives them (cpp/driver.cpp)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from support.plugin_driver import BF16, CHW4, FLOAT, HALF, INT8, INT32, INVALID_VALUE, LINEAR, TYPES

INT64 = 8
EVERY_TYPE = (FLOAT, HALF, BF16, INT32, INT8, INT64)


@dataclass(frozen=True)
class Plugin:
    """An operator's plugin.

    Attributes:
        name: of its creator.
        inputs: names of the inputs.
        shapes: of the inputs and the output, for a call that fits.
        fixed: position -> type of the tensors whose type does not follow the first input's.
        attributes: of the node.
        bad: (tensor, dimension, size, message) of calls that do not fit.
        tactics: how many a call of `shapes` has in float16.
    """

    name: str
    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tactics: int
    bad: dict[str, tuple[int, int, int, str]]
    fixed: dict[int, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)

    def types(self, code):
        """The types of all tensors where the first is of type `code`."""
        return [self.fixed.get(position, code) for position in range(len(self.shapes))]

    def arrays(self, shapes=None, code=HALF):
        """Inputs of ones and an output of zeros. Ones are no level of MSDeformAttn: it reads zero."""
        numpy_types = dict(TYPES.values()) | {INT32: np.int32}
        made = [np.ones(s, numpy_types[c]) for s, c in zip(shapes or self.shapes, self.types(code), strict=True)]
        return made[:-1], np.zeros_like(made[-1])

    def create(self, driver):
        return driver.create(self.name, **self.attributes)


PLUGINS = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            "DCNv3",
            ("input", "offset", "mask"),
            ((2, 32, 64, 32), (2, 32, 64, 36), (2, 32, 64, 18), (2, 32, 64, 32)),
            18,
            {
                "channels": (0, 3, 9, "input has 9 in dimension 3: expected 32"),
                "offset height": (1, 1, 5, "offset has 5 in dimension 1: expected 32"),
                "offset depth": (1, 3, 18, "offset has 18 in dimension 3: expected 36"),
                "mask batch": (2, 0, 1, "mask has 1 in dimension 0: expected 2"),
                "mask depth": (2, 3, 9, "mask has 9 in dimension 3: expected 18"),
                "output width": (3, 2, 9, "output has 9 in dimension 2: expected 64"),
            },
            attributes={"group": 2, "group_channels": 16, "mask_softmax": 1},
        ),
        Plugin(
            "DCNv3Packed",
            ("input", "offset_mask"),
            ((2, 32, 64, 32), (2, 32, 64, 54), (2, 32, 64, 32)),
            24,
            {
                "depth": (1, 3, 53, "offset_mask has 53 in dimension 3: expected 54"),
                "height": (1, 1, 5, "offset_mask has 5 in dimension 1: expected 32"),
                "output width": (2, 2, 9, "output has 9 in dimension 2: expected 64"),
            },
            attributes={"group": 2, "group_channels": 16, "mask_softmax": 1, "allow_half": 1},
        ),
        Plugin(
            "MSDeformAttn",
            ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"),
            ((2, 15, 4, 32), (1, 2), (1,), (2, 200, 4, 1, 4, 2), (2, 200, 4, 1, 4), (2, 200, 128)),
            6,  # tiles of one and of four rows are the same
            {
                "pairs": (1, 1, 3, "spatial_shapes has 3 in dimension 1: expected 2"),
                "starts": (2, 0, 2, "level_start_index has 2 in dimension 0: expected 1"),
                "batch": (3, 0, 1, "sampling_locations has 1 in dimension 0: expected 2"),
                "heads": (3, 2, 3, "sampling_locations has 3 in dimension 2: expected 4"),
                "levels": (3, 3, 2, "sampling_locations has 2 in dimension 3: expected 1"),
                "x and y": (3, 5, 3, "sampling_locations has 3 in dimension 5: expected 2"),
                "queries": (4, 1, 8, "attention_weights has 8 in dimension 1: expected 200"),
                "weights' levels": (4, 3, 3, "attention_weights has 3 in dimension 3: expected 1"),
                "points": (4, 4, 8, "attention_weights has 8 in dimension 4: expected 4"),
                "output's queries": (5, 1, 8, "output has 8 in dimension 1: expected 200"),
                "channels": (5, 2, 8, "output has 8 in dimension 2: expected 128"),
            },
            fixed={1: INT32, 2: INT32, 3: FLOAT},
        ),
        Plugin(
            "UpsampleArgmax",
            ("logits",),
            ((2, 5, 16, 24), (2, 64, 96)),
            8,  # rows as narrow as these make some blocks alike
            {
                "batch": (1, 0, 1, "output has 1 in dimension 0: expected 2"),
                "height": (1, 1, 63, "output has 63 in dimension 1: expected 64"),
                "width": (1, 2, 24, "output has 24 in dimension 2: expected 96"),
            },
            fixed={1: INT32},
        ),
    )
}
BAD_SHAPES = [pytest.param(p, *bad, id=f"{p.name} {name}") for p in PLUGINS.values() for name, bad in p.bad.items()]
every_plugin = pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)


@every_plugin
def test_output_shape_follows_dynamic_inputs_and_refuses_other_ranks_and_counts(plugin, driver):
    made = plugin.create(driver)
    *inputs, output = plugin.shapes
    count = len(inputs)
    assert driver.output_shape(made, inputs) == output
    assert driver.output_shape(made, [*inputs, inputs[0]]) is None
    expected = f"expected {count} inputs ({', '.join(plugin.inputs)}) and 1 output"
    assert f"got {count + 1} inputs and 1 outputs: {expected}" in driver.log()
    for index, (name, shape) in enumerate(zip(plugin.inputs, inputs, strict=True)):
        assert driver.output_shape(made, [*inputs[:index], (*shape, 1), *inputs[index + 1 :]]) is None
        assert f"{name} must have {len(shape)} dimensions, and has {len(shape) + 1}" in driver.log()


@every_plugin
def test_types_and_formats(plugin, driver):
    made = plugin.create(driver)
    tensors, inputs = len(plugin.shapes), len(plugin.inputs)

    def supported(position, codes, *, format=LINEAR, counts=(inputs, 1)):
        formats = [LINEAR] * tensors
        formats[position] = format
        return driver.supports(made, position, codes, formats, *counts)

    for code, _ in TYPES.values():
        right = plugin.types(code)
        for position in range(tensors):
            before, after = right[:position], right[position + 1 :]
            taken = {kind for kind in EVERY_TYPE if supported(position, [*before, kind, *after])}
            assert taken == ({FLOAT, HALF, BF16} if position == 0 else {right[position]})
            assert not supported(position, right, format=CHW4)
        assert not supported(0, right, counts=(inputs + 1, 1))
        assert not supported(0, right, counts=(inputs, 2))
        assert driver.call("output_type", made, code, inputs) == right[-1]


@pytest.mark.parametrize(("plugin", "tensor", "dimension", "size", "message"), BAD_SHAPES)
def test_bad_shapes_are_refused_with_all_shapes(plugin, tensor, dimension, size, message, driver):
    shapes = [list(s) for s in plugin.shapes]
    shapes[tensor][dimension] = size
    types = plugin.types(HALF)
    made = plugin.create(driver)
    status = driver.configure(made, shapes, types)
    log = driver.log()
    assert message in log
    assert f"{plugin.inputs[-1]} (" in log
    assert f"{plugin.name} 'layer7'" in log
    if driver.interface == "v3":
        assert status != 0
        assert driver.shape_change(made, shapes, types) != 0
        assert message in driver.log()
    operands, output = plugin.arrays()
    assert driver.enqueue(made, operands, output, shapes) == INVALID_VALUE
    assert message in driver.log()


@every_plugin
def test_unknown_dimensions_are_accepted_while_configuring(plugin, driver):
    made = plugin.create(driver)
    types = plugin.types(HALF)
    assert driver.configure(made, plugin.shapes, types) == 0
    assert driver.configure(made, [(-1,) * len(shape) for shape in plugin.shapes], types) == 0
    assert driver.log() == ""


@every_plugin
def test_an_empty_batch_is_no_launch(plugin, driver):
    shapes = [(0, *s[1:]) if s[0] == plugin.shapes[0][0] else s for s in plugin.shapes]
    operands, output = plugin.arrays(shapes)
    driver.lib.driver_fail_launches(INVALID_VALUE)
    assert driver.enqueue(plugin.create(driver), operands, output) == 0


@every_plugin
def test_a_failed_launch_is_reported_with_shapes(plugin, driver):
    operands, output = plugin.arrays()
    driver.lib.driver_fail_launches(701)  # cudaErrorLaunchOutOfResources
    assert driver.enqueue(plugin.create(driver), operands, output) == 701
    log = driver.log()
    assert "too many resources" in log
    assert f"{plugin.inputs[0]} {plugin.shapes[0]}" in log


@every_plugin
@pytest.mark.parametrize("damage", [1, 2], ids=["short", "other tag"])
def test_damaged_engines_are_refused(plugin, damage, v2):
    assert v2.call("reload", plugin.create(v2), damage) is None
    assert "rebuild the engine" in v2.log()


@every_plugin
def test_tactics_are_offered_set_cloned_and_used(plugin, v3):
    made = plugin.create(v3)
    every = v3.tactics(made)
    assert every == list(range(1, len(every) + 1))
    assert v3.configure(made, plugin.shapes, plugin.types(HALF)) == 0
    offered = v3.tactics(made)
    assert len(set(offered)) == len(offered) == plugin.tactics
    results = []
    for tactic in (0, *offered):
        assert v3.call("set_tactic", made, tactic) == 0
        clone = v3.keep(v3.call("clone", made))
        operands, output = plugin.arrays()
        assert v3.enqueue(clone, operands, output) == 0
        assert v3.lib.driver_last_tactic() == tactic
        results.append(output)
    # Ones everywhere and whole-pixel positions: every kernel rounds alike.
    assert all(np.array_equal(results[0], other) for other in results)
    for tactic in (-1, len(every) + 1):
        assert v3.call("set_tactic", made, tactic) != 0
        assert "does not exist" in v3.log()


def test_the_timing_cache_tells_the_plugins_apart(v3):
    identities = {v3.call("timing_id", plugin.create(v3)) for plugin in PLUGINS.values()}
    assert len(identities) == len(PLUGINS)

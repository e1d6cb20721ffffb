# SPDX-License-Identifier: Apache-2.0
"""UpsampleArgmax in both plugin classes, driven as TensorRT drives them, with the kernel on the host."""

from __future__ import annotations

import numpy as np
import pytest

from internimage_deploy.operators.upsample_argmax import OP_TYPE
from internimage_deploy.trt_plugins import host
from support.plugin_driver import HALF, INT32, TYPES


@pytest.mark.parametrize("dtype", list(TYPES))
def test_computes_the_labels_also_when_cloned_and_reloaded(driver, dtype):
    logits = np.random.default_rng(0).standard_normal((2, 7, 5, 6)).astype(TYPES[dtype][1])
    expected = host.upsample_argmax(logits)
    plugin = driver.create(OP_TYPE)
    clone = driver.keep(driver.call("clone", plugin))
    for each in (plugin, clone, driver.keep(driver.call("reload", clone, 0))):
        assert driver.call("name", each).decode() == OP_TYPE
        labels = np.full((2, 20, 24), -1, np.int32)
        assert driver.enqueue(each, [logits], labels) == 0, driver.log()
        np.testing.assert_array_equal(labels, expected)


def test_there_are_no_attributes(driver):
    assert driver.field_names(OP_TYPE) == set()
    assert driver.create(OP_TYPE, axis=1) is None
    assert "UpsampleArgmax 'layer7': unknown attribute 'axis'" in driver.log()


def test_what_is_known_of_a_dynamic_shape_is_checked(driver):
    plugin = driver.create(OP_TYPE)
    assert driver.configure(plugin, [(-1, 19, -1, 6), (-1, -1, 24)], [HALF, INT32]) == 0
    assert driver.log() == ""
    driver.configure(plugin, [(-1, 19, -1, 6), (-1, -1, 12)], [HALF, INT32])
    assert "output has 12 in dimension 2: expected 24" in driver.log()

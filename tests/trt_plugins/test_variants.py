# SPDX-License-Identifier: Apache-2.0
"""Which compiled kernel serves which call; every one of them runs here and agrees with the others."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest
from test_kernel import NUMPY, PLAIN, draw, error, reference

from internimage_deploy.trt_plugins import host


def shifted(array, elements):
    """A copy of `array` that starts `elements` elements after a 64-byte boundary."""
    memory = np.empty(array.nbytes + 64 + array.itemsize * elements, np.uint8)
    start = -memory.ctypes.data % 64 + array.itemsize * elements
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[:] = array
    return view


def serve(dtype, channels, *, softmax=False, tactic=0, shift=0, op=PLAIN):
    """Run one call; returns the variant that served it and its error against float64."""
    stored = [a.astype(NUMPY[dtype]) for a in draw(1, height=5, width=6, channels=channels, softmax=softmax, **op)]
    stored[0] = shifted(stored[0], shift)
    stored[1] = shifted(stored[1], 0)
    params, output = host.make_params(*stored, mask_softmax=softmax, **op)
    aligned = shifted(output, 0)
    params.output = aligned.ctypes.data
    variant = host.run(params, dtype, tactic=tactic)
    return variant, error(aligned, reference(*stored, mask_softmax=softmax, **op))


def test_every_variant_is_reached_and_right():
    reached = set()
    for dtype in NUMPY:
        tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        for channels in (16, 32, 24, 8, 4, 2, 1, 3):
            for softmax in (False, True):
                for tactic in range(host.tactics() + 1):
                    variant, worst = serve(dtype, channels, softmax=softmax, tactic=tactic)
                    assert worst < tolerance, (variant, tactic)
                    reached.add(variant)
    assert reached == set(host.variants())


@pytest.mark.parametrize(
    ("channels", "kernel", "shift", "width", "group"),
    [
        (16, 3, 0, 8, 16),
        (32, 3, 0, 8, 32),
        (16, 5, 0, 8, 0),
        (24, 3, 0, 8, 0),
        (20, 3, 0, 4, 0),
        (6, 3, 0, 2, 0),
        (5, 3, 0, 1, 0),
        (16, 3, 4, 4, 0),
        (16, 3, 1, 1, 0),
    ],
)
def test_choice_follows_group_width_kernel_and_alignment(channels, kernel, shift, width, group):
    op = PLAIN | {"kernel": kernel, "pad": kernel // 2}
    variant, worst = serve("float16", channels, shift=shift, op=op)
    assert (variant.width, variant.group) == (width, group)
    assert worst < 2e-3


def test_non_square_3x3_offsets_and_kernels_take_the_general_path():
    variant, worst = serve("float32", 16, op=PLAIN | {"kernel": (3, 5), "pad": (1, 2)})
    assert variant.group == 0
    assert worst < 2e-6


@pytest.mark.parametrize(("groups", "group"), [(2, 16), (4, 16), (1, 0)], ids=str)
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_offsets_and_mask_in_one_tensor(dtype, groups, group):
    op = PLAIN | {"group": groups}
    input, *sampling = (a.astype(NUMPY[dtype]) for a in draw(3, height=5, width=6, channels=16, softmax=True, **op))
    expected = host.dcnv3(input, *sampling, mask_softmax=True, **op)
    both = np.concatenate(sampling, -1)
    views = both[..., : 18 * groups], both[..., 18 * groups :]
    params, output = host.make_params(input, *views, mask_softmax=True, **op)
    # An odd number of columns puts every second pair of offsets across two words.
    assert host.run(params, dtype).group == group
    tolerance = 0 if group else 2e-6  # the general kernel rounds in another order
    np.testing.assert_allclose(output.astype(np.float32), expected.astype(np.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tactic", range(13))
@pytest.mark.parametrize("groups", [1, 7, 40, 80], ids=lambda g: f"G{g}")
def test_geometry_covers_every_element_once(groups, tactic):
    # Unwritten elements stay NaN; a wrong position would change the value.
    op = PLAIN | {"group": groups}
    input, offset, mask = draw(2, batch=2, height=3, width=11, channels=32, **op)
    result = host.dcnv3(input, offset, mask, tactic=tactic, **op)
    assert error(result, reference(input, offset, mask, **op)) < 2e-6


def test_distinct_tactics_are_offered_once():
    stored = [a.astype(np.float16) for a in draw(1, height=8, width=64, channels=16, **PLAIN)]
    params, _ = host.make_params(*stored, **PLAIN)
    flags = [
        host.library().dcnv3_host_is_distinct(ctypes.byref(params), 1, tactic)
        for tactic in range(1, host.tactics() + 1)
    ]
    assert flags[0] == 1
    assert sum(flags) == 12
    # One pixel: tiles of one or four rows are the same.
    stored = [a.astype(np.float16) for a in draw(1, height=1, width=1, channels=16, **PLAIN)]
    params, _ = host.make_params(*stored, **PLAIN)
    flags = [host.library().dcnv3_host_is_distinct(ctypes.byref(params), 1, tactic) for tactic in range(1, 13)]
    assert sum(flags) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_equal_numpy(dtype):
    code = host.DTYPES.index(dtype)
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(NUMPY[dtype])
    wide = np.empty(every.size, np.float32)
    host.library().dcnv3_host_widen(every.ctypes.data, wide.ctypes.data, wide.size, code)
    np.testing.assert_array_equal(wide, every.astype(np.float32))

    # Every value, the middle to its neighbour, and the floats on both sides of that.
    finite = np.sort(wide[np.isfinite(wide)])
    middle = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    floats = np.concatenate([finite, middle, np.nextafter(middle, np.float32(-np.inf)),
                             np.nextafter(middle, np.float32(np.inf)),
                             np.float32([np.nan, np.inf, -np.inf, 65519.996, 65520, 3.4e38, 1e-45])])  # fmt: skip
    narrow = np.empty(floats.size, NUMPY[dtype])
    host.library().dcnv3_host_narrow(floats.ctypes.data, narrow.ctypes.data, floats.size, code)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow.astype(np.float32), floats.astype(NUMPY[dtype]).astype(np.float32))


def test_dtypes_are_named_alike():
    assert [np.dtype(NUMPY[name]).name for name in host.DTYPES] == list(host.DTYPES)
    assert host.bfloat16() == ml_dtypes.bfloat16

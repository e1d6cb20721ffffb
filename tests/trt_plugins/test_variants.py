# SPDX-License-Identifier: Apache-2.0
"""Which compiled kernel serves which call; every one of them runs here and agrees with the others."""

from __future__ import annotations

import functools
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from test_kernel import LAST_TACTIC, NUMPY, PLAIN, TORCH, draw, error, golden_case, reference

from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.host_operators import library
from support import golden
from support.memory import shifted


@functools.cache
def problem(dtype, channels, softmax, **op):
    """Operands in their storage type, and the output in float64."""
    stored = [a.astype(NUMPY[dtype]) for a in draw(1, height=5, width=6, channels=channels, softmax=softmax, **op)]
    return stored, reference(*stored, mask_softmax=softmax, **op)


def serve(dtype, channels, *, softmax=False, tactic=0, shift=0, allow_half=False, op=PLAIN):
    """Run one call; returns the variant that served it and its error against float64."""
    (input, offset, mask), expected = problem(dtype, channels, softmax, **op)
    stored = shifted(input, shift), shifted(offset, 0), mask
    params, output = host.make_params(*stored, mask_softmax=softmax, allow_half=allow_half, **op)
    aligned = shifted(output, 0)
    params.output = aligned.ctypes.data
    variant = host.DCNV3.run(params, dtype, tactic=tactic)
    return variant, error(aligned, expected)


def test_every_variant_is_reached_and_right():
    reached = set()
    for dtype in NUMPY:
        tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        for channels in (16, 32, 24, 8, 4, 2, 1, 3):
            for softmax in (False, True):
                for tactic in range(LAST_TACTIC + 1):
                    variant, worst = serve(dtype, channels, softmax=softmax, tactic=tactic, allow_half=True)
                    assert worst < tolerance, (variant, tactic)
                    reached.add(variant)
    assert reached == set(host.DCNV3.variants())


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
    assert host.DCNV3.run(params, dtype).group == group
    tolerance = 0 if group else 2e-6  # the general kernel rounds in another order
    np.testing.assert_allclose(output.astype(np.float32), expected.astype(np.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tactic", range(LAST_TACTIC + 1))
@pytest.mark.parametrize("groups", [1, 7, 40, 80], ids=lambda g: f"G{g}")
def test_geometry_covers_every_element_once(groups, tactic):
    # Unwritten elements stay NaN; a wrong position would change the value.
    op = PLAIN | {"group": groups}
    input, offset, mask = draw(2, batch=2, height=3, width=11, channels=32, **op)
    result = host.dcnv3(input, offset, mask, tactic=tactic, **op)
    assert error(result, reference(input, offset, mask, **op)) < 2e-6


def distinct(dtype="float16", *, height=8, width=64, channels=16, softmax=True, allow_half=False):
    """How many tactics are offered for each body and number of vectors."""
    operands = draw(1, height=height, width=width, channels=channels, softmax=softmax, **PLAIN)
    stored = [a.astype(NUMPY[dtype]) for a in operands]
    params, _ = host.make_params(*stored, mask_softmax=softmax, allow_half=allow_half, **PLAIN)
    offered = host.DCNV3.distinct_tactics(params, dtype)
    assert offered[0] == 1
    variants = [host.DCNV3.run(params, dtype, tactic=tactic) for tactic in offered]
    return Counter((variant.body, variant.vectors) for variant in variants)


def test_distinct_tactics_are_offered_once():
    plain = {("branching", 1): 6, ("branching", 2): 6}
    free = {("branch-free", 1): 3, ("branch-free", 2): 3}
    assert distinct() == distinct("bfloat16", allow_half=True) == distinct("float32") == plain | free
    # A whole group of 32 channels in one thread.
    assert distinct(channels=32) == plain | free | {("branching", 4): 3, ("branch-free", 4): 2}
    assert distinct("float32", channels=32) == plain | free
    # The variants for tuning take logits.
    assert distinct(softmax=False, allow_half=True) == plain
    # One pixel: tiles of one or four rows are the same.
    assert distinct(height=1, width=1) == dict.fromkeys(plain | free, 1)


def test_kernels_in_float16_are_offered_where_they_are_allowed():
    half = {("half", 1): 3, ("half", 2): 3}
    assert distinct(allow_half=True) == distinct() | half
    assert distinct(channels=32, allow_half=True) == distinct(channels=32) | half | {("half", 4): 2}
    for tactic in range(LAST_TACTIC + 1):
        assert serve("float16", 16, softmax=True, tactic=tactic)[0].body != "half"
    assert serve("float16", 16, softmax=True, allow_half=True)[0].body == "branching"


@pytest.mark.parametrize("name", list(golden.case("dcnv3_op")))
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_every_body_computes_the_golden_cases(name, dtype):
    op, input, offset, mask, expected = golden_case(name)
    # Logits whose softmax is the mask: the bodies are compiled for those.
    operands = [array.astype(NUMPY[dtype]) for array in (input, offset, np.log(np.maximum(mask, 1e-30)))]
    own = error(reference(*operands, mask_softmax=True, dtype=TORCH[dtype], **op), expected)
    bodies = set()
    for tactic in range(LAST_TACTIC + 1):
        params, output = host.make_params(*operands, mask_softmax=True, allow_half=True, **op)
        bodies.add(host.DCNV3.run(params, dtype, tactic=tactic).body)
        # As near as twice what PyTorch is in the same precision.
        assert error(output, expected) <= max(2 * own, 1e-5), tactic
    tuned = op["kernel"] == 3 and input.shape[-1] // op["group"] in (16, 32)
    more = {"branch-free", "half"} if dtype == "float16" else {"branch-free"}
    assert bodies == {"branching"} | (more if tuned else set())


@pytest.mark.parametrize(("body", "tactic"), [("branch-free", 20), ("half", 28)])
@pytest.mark.parametrize("value", [1e4, -3e4, np.nan, np.inf, -np.inf], ids=str)
def test_wild_offsets_read_nothing_without_branches(body, tactic, value):
    # NaN lies around the input: one that is read reaches the output, whatever its weight.
    input, offset, mask = draw(7, height=6, width=6, channels=16, spread=3, softmax=True, **PLAIN)
    padded = np.full((1, 40, 6, 32), np.nan, np.float16)
    padded[:, 17:23] = input
    with np.errstate(over="ignore"):
        offset[0, 2, 3, 4] = value  # x of point 2, group 0
        offset[0, 4, 1, 7] = value  # y of point 3, group 0
        offset = offset.astype(np.float16)
    logits = mask.astype(np.float16)
    params, output = host.make_params(padded[:, 17:23], offset, logits, mask_softmax=True, allow_half=True, **PLAIN)
    assert host.DCNV3.run(params, "float16", tactic=tactic).body == body
    finite = np.where(np.isfinite(offset), offset, np.float16(1e4))
    assert error(output, reference(input.astype(np.float16), finite, logits, mask_softmax=True, **PLAIN)) < 4e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_equal_numpy(dtype):
    code = host.DTYPES.index(dtype)
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(NUMPY[dtype])
    wide = np.empty(every.size, np.float32)
    library().host_widen(every.ctypes.data, wide.ctypes.data, wide.size, code)
    np.testing.assert_array_equal(wide, every.astype(np.float32))

    # Every value, the middle to its neighbour, and the floats on both sides of that.
    finite = np.sort(wide[np.isfinite(wide)])
    middle = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    floats = np.concatenate([finite, middle, np.nextafter(middle, np.float32(-np.inf)),
                             np.nextafter(middle, np.float32(np.inf)),
                             np.float32([np.nan, np.inf, -np.inf, 65519.996, 65520, 3.4e38, 1e-45])])  # fmt: skip
    narrow = np.empty(floats.size, NUMPY[dtype])
    library().host_narrow(floats.ctypes.data, narrow.ctypes.data, floats.size, code)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow.astype(np.float32), floats.astype(NUMPY[dtype]).astype(np.float32))


def test_dtypes_are_named_alike():
    assert [np.dtype(NUMPY[name]).name for name in host.DTYPES] == list(host.DTYPES)
    assert host.bfloat16() == ml_dtypes.bfloat16

# SPDX-License-Identifier: Apache-2.0
"""The MSDeformAttn kernel's arithmetic, run on the host, against golden files and the definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernel import LAST_TACTIC

from internimage_deploy.errors import UserError
from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.host_operators import tactics
from support.memory import shifted
from support.ms_deform_attn_cases import GOLDEN, NUMPY, UNIT, draw, golden_case, reference, stored

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def error(actual, expected):
    return float(np.abs(np.asarray(actual, np.float64) - expected).max())


def agrees(operands, dtype="float32", *, tactic=0):
    """Whether the kernel's result is the definition's, rounded once to `dtype`."""
    operands = stored(operands, dtype)
    result = host.ms_deform_attn(*operands, tactic=tactic)
    assert result.dtype == NUMPY[dtype]
    np.testing.assert_allclose(
        result.astype(np.float64), reference(*operands), rtol=UNIT[dtype], atol=max(UNIT[dtype] / 4, 1e-5)
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_the_reference_is_the_official_operator(name):
    operands, output = golden_case(name)
    np.testing.assert_allclose(reference(*operands), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_float32(name):
    operands, output = golden_case(name)
    np.testing.assert_allclose(host.ms_deform_attn(*operands), output, rtol=0, atol=1e-5)


def torch_in(dtype, value, shapes, starts, locations, weights):
    """PyTorch's usual formula with values, samples, weights and sums in `dtype`; locations stay float32."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    samples = []
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        part = torch.from_numpy(value[:, start : start + height * width].astype(np.float32)).to(dtype)
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = torch.from_numpy(2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = torch.nn.functional.grid_sample(maps.float(), grid, align_corners=False)
        samples.append(sampled.to(dtype))
    weight = torch.from_numpy(weights.astype(np.float32)).to(dtype).transpose(1, 2).flatten(0, 1).flatten(2)
    total = (torch.cat(samples, -1) * weight[:, None]).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2).double().numpy()


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_narrow_within_twice_pytorch(name, dtype):
    operands, output = golden_case(name)
    rounded = stored(operands, dtype)
    result = host.ms_deform_attn(*rounded)
    assert error(result, output) <= 2 * error(torch_in(TORCH[dtype], *rounded), output)


def test_hand_worked_point():
    # One point of weight 2 at row 0.25, column 0.5 of a 2x2 map: 0.5*0.75 of (1, 2) and 0.5*0.25 of (3, 4).
    value = np.array([9, 1, 2, 3, 4], np.float32).reshape(1, 5, 1, 1)
    location = np.array([1.0 / 2, 0.75 / 2], np.float32).reshape(1, 1, 1, 1, 1, 2)
    weight = np.full((1, 1, 1, 1, 1), 2, np.float32)
    result = host.ms_deform_attn(value, [[2, 2]], [1], location, weight)
    assert result.ravel().tolist() == [2 * (0.375 * (1 + 2) + 0.125 * (3 + 4))]


AWKWARD = {
    "one cell": {"shapes": ((1, 1),)},
    "cells among maps": {"shapes": ((1, 1), (4, 3), (1, 7), (9, 1))},
    "one channel": {"channels": 1, "points": 1, "heads": 1},
    "three channels": {"channels": 3, "shapes": ((2, 2), (3, 3))},
    "forty channels": {"channels": 40, "batch": 2},
    "one point": {"channels": 32, "points": 1, "shapes": ((5, 4), (2, 3))},
    "many levels": {"shapes": tuple((1 + i % 4, 1 + i % 3) for i in range(40)), "channels": 16},
    "seven heads": {"heads": 7, "queries": 65, "batch": 3},
    "one query": {"queries": 1, "heads": 32, "channels": 32, "shapes": ((2, 3), (4, 6), (8, 12))},
}


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD)
def test_awkward_sizes(case, dtype):
    agrees(draw(1, **case), dtype)


def surrounded(value):
    """A copy of one image's `value` in the middle of memory that would show: a NaN read reaches the output."""
    keys = value.shape[1]
    memory = np.full((1, keys + 64, *value.shape[2:]), np.nan, value.dtype)
    memory[:, 32 : 32 + keys] = value
    return memory[:, 32 : 32 + keys]


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38, 2.0**24, -(2.0**21)], ids=str)
@pytest.mark.parametrize("channels", [32, 5], ids=lambda c: f"D{c}")
def test_wild_locations_read_nothing(wild, dtype, channels):
    value, shapes, starts, locations, weights = stored(draw(3, channels=channels, shapes=((3, 4), (6, 2))), dtype)
    locations[0, 2, 1, 0, 1, 0] = wild
    locations[0, 3, 0, 1, 2, 1] = wild
    locations[0, 4, 1, 1, 0] = wild
    result = host.ms_deform_attn(surrounded(value), shapes, starts, locations, weights)
    expected = reference(value, shapes, starts, locations, weights)
    np.testing.assert_allclose(result.astype(np.float64), expected, rtol=UNIT[dtype], atol=max(UNIT[dtype] / 4, 1e-5))


@pytest.mark.parametrize("axis", [0, 1], ids="xy")
def test_every_pattern_of_a_float32_stays_inside(axis):
    # Every sign and exponent and a few mantissas, on a map surrounded by NaN.
    bits = (np.arange(512, dtype=np.uint64)[:, None] << 23 | np.array([0, 1, 0x400000, 0x7FFFFF], np.uint64)).ravel()
    locations = np.full((1, bits.size, 1, 1, 1, 2), 0.5, np.float32)
    locations[0, :, 0, 0, 0, axis] = bits.astype(np.uint32).view(np.float32)
    operands = surrounded(np.ones((1, 15, 1, 4), np.float32)), np.array([[3, 5]]), np.array([0])
    weights = np.ones((1, bits.size, 1, 1, 1), np.float32)
    result = host.ms_deform_attn(*operands, locations, weights)
    np.testing.assert_allclose(result, reference(*operands, locations, weights), atol=1e-6)


BROKEN = {
    "no rows": ((0, 4), 0),
    "negative height": ((-3, 4), 0),
    "both negative": ((-3, -4), 0),
    "too high": ((4, 4), 0),
    "too far": ((3, 4), 1),
    "before the start": ((3, 4), -1),
    "start far before": ((3, 4), -(2**31)),
    "start far behind": ((3, 4), 2**31 - 1),
    "sides overflow 32 bits": ((2**16, 2**16), 0),
    "sides overflow in the sum": ((2**31 - 1, 2**31 - 1), 2**31 - 1),
    "one side far too long": ((1, 2**31 - 1), 0),
    "product is small modulo 2^32": ((2**16 + 1, 2**16 - 1), 0),
}


@pytest.mark.parametrize("channels", [32, 5], ids=lambda c: f"D{c}")
@pytest.mark.parametrize(("shape", "start"), BROKEN.values(), ids=BROKEN)
def test_a_level_outside_value_reads_zero(shape, start, channels):
    value, shapes, starts, locations, weights = draw(5, channels=channels, shapes=((2, 1), (3, 4)), spread=0.6)
    # The first level is the broken one, the second is untouched; together they are 12 keys, so the first never fits.
    value, shapes, starts = value[:, :12], np.array([shape, (2, 3)]), np.array([start, 6])
    result = host.ms_deform_attn(surrounded(value), shapes, starts, locations, weights)
    alone = host.ms_deform_attn(value, shapes[1:], starts[1:], locations[..., 1:, :, :], weights[..., 1:, :])
    np.testing.assert_array_equal(result, alone)
    assert np.abs(result).max() > 0


@pytest.mark.parametrize("above", [False, True], ids=["at the limit", "above it"])
@pytest.mark.parametrize("upright", [False, True], ids=["wide", "high"])
def test_side_limit(above, upright):
    side = 2**21 + above
    shape = (side, 1) if upright else (1, side)
    locations = np.full((1, 3, 1, 1, 1, 2), 0.5, np.float32)
    locations[0, :, 0, 0, 0, int(upright)] = 0.25, (side - 0.5) / side, 2.0
    weights = np.ones((1, 3, 1, 1, 1), np.float32)
    result = host.ms_deform_attn(np.ones((1, side, 1, 1), np.float32), [shape], [0], locations, weights)
    assert result.ravel().tolist() == ([0, 0, 0] if above else [1, 1, 0])


def test_images_beyond_32_bits():
    # 6.4 GB that is reserved and hardly touched: the last keys lie beyond 2^32 bytes.
    value, shapes, starts, locations, weights = stored(draw(7, shapes=((2, 3),), heads=48, channels=32), "float16")
    keys = 2**21
    far = np.zeros((1, keys, 48, 32), np.float16)
    far[:, -6:] = value
    params, output, held = host.make_ms_deform_attn_params(far, shapes, [keys - 6], locations, weights)
    assert held[0] is far
    assert host.MS_DEFORM_ATTN.run(params, "float16").points == 0
    np.testing.assert_array_equal(output, host.ms_deform_attn(value, shapes, starts, locations, weights))
    # And a map of two rows that reaches across: every point on its last cell.
    locations[..., 0] = (2**20 - 0.5) / 2**20
    locations[..., 1] = 0.75
    across = host.ms_deform_attn(far, [[2, 2**20]], [0], locations, weights)
    corner = value[:, -1:], [[1, 1]], [0], np.full_like(locations, 0.5), weights
    np.testing.assert_array_equal(across, host.ms_deform_attn(*corner))


def serve(operands, dtype, *, tactic=0, shift=0):
    """Run one call with all arrays aligned but `value`; returns the variant that served it and its error."""
    value, shapes, starts, locations, weights = stored(operands, dtype)
    arrays = shifted(value, shift), shapes, starts, shifted(locations, 0), shifted(weights, 0)
    params, output, held = host.make_ms_deform_attn_params(*arrays)
    aligned = shifted(output, 0)
    params.output = aligned.ctypes.data
    variant = host.MS_DEFORM_ATTN.run(params, dtype, tactic=tactic)
    assert params.value == held[0].ctypes.data == arrays[0].ctypes.data
    return variant, error(aligned, reference(*arrays))


def test_every_variant_is_reached_and_right():
    reached = set()
    for dtype in NUMPY:
        tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        for channels in (32, 16, 8, 4, 2, 1, 3, 24):
            for points in (4, 3):
                for tactic in range(tactics() + 1):
                    operands = draw(2, channels=channels, points=points, shapes=((3, 4), (2, 2)))
                    variant, worst = serve(operands, dtype, tactic=tactic)
                    assert worst < tolerance, (variant, tactic)
                    reached.add(variant)
    assert reached == set(host.MS_DEFORM_ATTN.variants())


@pytest.mark.parametrize(
    ("channels", "points", "shift", "width", "fast"),
    [(32, 4, 0, 8, 4), (8, 4, 0, 8, 4), (32, 3, 0, 8, 0), (20, 4, 0, 4, 0), (6, 4, 0, 2, 0), (5, 4, 0, 1, 0),
     (32, 4, 4, 4, 0), (32, 4, 1, 1, 0)],
)  # fmt: skip
def test_choice_follows_channels_points_and_alignment(channels, points, shift, width, fast):
    variant, worst = serve(draw(2, channels=channels, points=points), "float16", shift=shift)
    assert (variant.width, variant.points) == (width, fast)
    assert worst < 2e-3


@pytest.mark.parametrize("tactic", range(LAST_TACTIC + 1))
@pytest.mark.parametrize("heads", [1, 7, 40], ids=lambda m: f"M{m}")
def test_geometry_covers_every_element_once(heads, tactic):
    # Unwritten elements stay NaN; a wrong position would change the value.
    agrees(draw(4, batch=3, heads=heads, channels=32, queries=67, shapes=((2, 2),)), tactic=tactic)


def test_distinct_tactics_are_offered_once():
    params, _, _ = host.make_ms_deform_attn_params(*stored(draw(1, channels=32, queries=500), "float16"))
    # Queries lie in one row, so that tiles of one and of four rows are the same.
    assert host.MS_DEFORM_ATTN.distinct_tactics(params, "float16") == [1, 3, 5, 7, 9, 11]


def test_coordinates_are_float32_whatever_the_values_are():
    # In half precision a location would be a whole pixel off at a width of 2048.
    agrees(draw(6, shapes=((1, 2048), (2, 1500)), queries=50, channels=32), "float16")


WRONG = {
    "value": (0, np.zeros((1, 15, 2), np.float32), r"value has shape \(1, 15, 2\): expected 4 dimensions"),
    "shapes": (1, np.zeros((1, 3), np.int64), r"spatial_shapes has shape \(1, 3\): expected \(1, 2\)"),
    "starts": (2, np.zeros((2,), np.int64), r"level_start_index has shape \(2,\): expected \(1,\)"),
    "locations": (3, np.zeros((1, 7, 2, 1, 4, 3), np.float32), r"sampling_locations .* expected \(1, 7, 2, 1, 4, 2\)"),
    "heads": (3, np.zeros((1, 7, 3, 1, 4, 2), np.float32), r"sampling_locations .* expected \(1, 7, 2, 1, 4, 2\)"),
    "weights": (4, np.zeros((1, 7, 2, 1, 3), np.float32), r"attention_weights .* expected \(1, 7, 2, 1, 4\)"),
    "double": (0, np.zeros((1, 15, 2, 8)), "value is float64: expected one of float32"),
    "half locations": (3, np.zeros((1, 7, 2, 1, 4, 2), np.float16), "sampling_locations is float16: expected float32"),
    "half weights": (4, np.zeros((1, 7, 2, 1, 4), np.float16), "attention_weights is float16: expected float32"),
    "float shapes": (1, np.zeros((1, 2)), "spatial_shapes is float64: expected integers"),
    "no queries": (3, np.zeros((1, 0, 2, 1, 4, 2), np.float32), r"attention_weights .* expected \(1, 0, 2, 1, 4\)"),
}


@pytest.mark.parametrize(("index", "array", "message"), WRONG.values(), ids=WRONG)
def test_wrong_operands_are_refused_by_name(index, array, message):
    operands = list(draw(1))
    operands[index] = array
    with pytest.raises(UserError, match=message):
        host.ms_deform_attn(*operands)


def test_the_kernel_refuses_what_it_cannot_index():
    params, _, _ = host.make_ms_deform_attn_params(*draw(1))
    for name, value, message in (
        ("queries", 0, "an empty tensor"),
        ("levels", 0, "an empty tensor"),
        ("keys", -1, "a negative number of keys"),
        ("queries", 2**30 + 1, r"2\^30 queries"),
        ("head_channels", 2**30, r"2\^30 queries or channels"),
        ("points", 2**30 + 1, r"2\^30 points"),
        ("sampling_locations", params.sampling_locations + 4, "not aligned"),
        ("value", params.value + 2, "not aligned"),
    ):
        changed = host.MsDeformAttnParams.from_buffer_copy(params)
        setattr(changed, name, value)
        with pytest.raises(UserError, match=message):
            host.MS_DEFORM_ATTN.run(changed, "float32")
    for tactic in (-1, tactics() + 1):
        with pytest.raises(UserError, match="no such tactic"):
            host.MS_DEFORM_ATTN.run(params, "float32", tactic=tactic)


def test_without_keys_the_output_is_zero():
    value, _, _, locations, weights = draw(1)
    result = host.ms_deform_attn(value[:, :0], [[3, 5]], [0], locations, weights)
    assert np.abs(result).max() == 0


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "shapes": st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
            "queries": st.integers(1, 20),
            "heads": st.integers(1, 5),
            "channels": st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 40]),
            "points": st.sampled_from([1, 2, 3, 4, 4, 4, 5, 8]),
            "spread": st.sampled_from([0.0, 0.1, 0.5, 2.0]),
        }
    ),
    st.sampled_from(list(NUMPY)),
    st.integers(0, LAST_TACTIC),
    st.integers(0, 2**32 - 1),
)
def test_random_settings_agree_with_the_definition(sizes, dtype, tactic, seed):
    agrees(draw(seed, **sizes), dtype, tactic=tactic)

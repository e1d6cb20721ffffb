# SPDX-License-Identifier: Apache-2.0
"""The kernel's arithmetic, run on the host, against golden files and the exporter's PyTorch operator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.models.dcnv3 import dcnv3 as torch_dcnv3
from internimage_deploy.operators.contract import output_size
from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.host_operators import tactics
from support import golden

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAST_TACTIC = 31
PLAIN = {"kernel": 3, "stride": 1, "pad": 1, "dilation": 1, "group": 2, "offset_scale": 1.0}


def draw(seed, *, batch=1, height, width, channels, spread=2.0, softmax=False, **op):
    """Random operands in float32: input, offset, mask."""
    kernel, stride, pad, dilation = (host._pair(op[name], name) for name in ("kernel", "stride", "pad", "dilation"))
    rows, columns = (
        output_size(size, kernel[i], stride[i], pad[i], dilation[i]) for i, size in enumerate((height, width))
    )
    points = kernel[0] * kernel[1]
    rng = np.random.default_rng(seed)
    input = rng.standard_normal((batch, height, width, op["group"] * channels), np.float32)
    offset = spread * rng.standard_normal((batch, rows, columns, op["group"] * points * 2), np.float32)
    mask = rng.standard_normal((batch, rows, columns, op["group"], points), np.float32)
    if not softmax:
        mask = np.exp(mask) / np.exp(mask).sum(-1, keepdims=True)
    return input, offset, mask.reshape(batch, rows, columns, -1)


def reference(input, offset, mask, dtype=torch.float64, **op):
    """The exporter's operator; float64 by default. Operands are taken as they are stored."""
    arrays = [torch.from_numpy(np.asarray(a, np.float64)).to(dtype) for a in (input, offset, mask)]
    return torch_dcnv3(*arrays, **op).double().numpy()


def error(actual, expected):
    return float(np.abs(np.asarray(actual, np.float64) - expected).max())


def golden_case(name):
    case = golden.case("dcnv3_op")[name]
    arrays = golden.arrays("dcnv3_op")
    op = {key: case[key] for key in ("kernel", "stride", "pad", "dilation", "group", "offset_scale")}
    return op, *(arrays[f"{name}.{part}"] for part in ("input", "offset", "mask", "output"))


@pytest.mark.parametrize("name", list(golden.case("dcnv3_op")))
def test_golden_float32(name):
    op, input, offset, mask, output = golden_case(name)
    np.testing.assert_allclose(host.dcnv3(input, offset, mask, **op), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", list(golden.case("dcnv3_op")))
def test_golden_narrow_within_twice_pytorch(name, dtype):
    op, *operands, output = golden_case(name)
    stored = [array.astype(NUMPY[dtype]) for array in operands]
    result = host.dcnv3(*stored, **op)
    assert result.dtype == NUMPY[dtype]
    assert error(result, output) <= 2 * error(reference(*stored, dtype=TORCH[dtype], **op), output)


def test_hand_worked_point():
    # One point, moved half a pixel right and a quarter down: 0.5*0.75 of (1, 2) and 0.5*0.25 of (3, 4).
    input = np.array([[1, 2], [3, 4]], np.float32).reshape(1, 2, 2, 1)
    offset = np.zeros((1, 2, 2, 2), np.float32)
    offset[0, 0, 0] = 0.5, 0.25
    result = host.dcnv3(
        input, offset, np.full((1, 2, 2, 1), 2, np.float32),
        kernel=1, stride=1, pad=0, dilation=1, group=1, offset_scale=1.0,
    )  # fmt: skip
    assert result[0, 0, 0, 0] == 2 * (0.375 * (1 + 2) + 0.125 * (3 + 4))
    assert result[0, 1].ravel().tolist() == [6, 8]


@pytest.mark.parametrize("channels", [16, 32, 20], ids=lambda c: f"C{c}")
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_softmax_inside_equals_softmax_outside(dtype, channels):
    operands = draw(3, height=9, width=7, channels=channels, softmax=True, **PLAIN)
    stored = [array.astype(NUMPY[dtype]) for array in operands]
    stored[2][0, 0, 0, :9] = 60  # exp(60) is beyond float16 and 9 * exp(89) beyond float32: the maximum must go first
    stored[2][0, 0, 1, :9] = np.array([-np.inf] + [1000.0] * 8, np.float32).astype(NUMPY[dtype])
    result = host.dcnv3(*stored, mask_softmax=True, **PLAIN)
    expected = reference(*stored, mask_softmax=True, **PLAIN)
    same_precision = reference(*stored, mask_softmax=True, dtype=TORCH[dtype], **PLAIN)
    assert error(result, expected) <= 2 * error(same_precision, expected)


@pytest.mark.parametrize("axis", ["height", "width"])
def test_coordinates_stay_exact_at_4096_pixels(axis):
    sides = {"height": 2, "width": 2} | {axis: 4096}
    op = PLAIN | {"group": 1}
    input, offset, mask = draw(5, channels=16, **sides, **op)
    expected = reference(input, offset, mask, **op)
    ours = error(host.dcnv3(input, offset, mask, **op), expected)
    assert ours < 3e-6
    # Absolute float32 coordinates would lose this much: the reference in float32 shows it.
    assert error(reference(input, offset, mask, dtype=torch.float32, **op), expected) > 30 * ours


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("value", [1e4, -1e4, 3e4, np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("channels", [16, 5], ids=lambda c: f"C{c}")
def test_wild_offsets_read_nothing(value, dtype, channels):
    # The input is a window in the middle of memory that would show: a NaN read anywhere would reach the output.
    input, offset, mask = draw(7, height=6, width=6, channels=channels, spread=0.3, **PLAIN)
    padded = np.full((1, 40, 6, input.shape[-1]), np.nan, np.float32)
    padded[:, 17:23] = input
    window = padded.astype(NUMPY[dtype])[:, 17:23]
    offset[0, 2, 3, 4] = value  # x of point 2, group 0
    offset[0, 4, 1, 7] = value  # y of point 3, group 0
    result = host.dcnv3(window, offset.astype(NUMPY[dtype]), mask.astype(NUMPY[dtype]), **PLAIN)
    offset[~np.isfinite(offset)] = 1e4
    stored = [array.astype(NUMPY[dtype]) for array in (input, offset, mask)]
    assert error(result, reference(*stored, **PLAIN)) < {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]


def test_every_float32_offset_pattern_stays_inside():
    # Offsets of every sign, exponent and a few mantissas, in x and in y, on an input surrounded by NaN.
    bits = (np.arange(512, dtype=np.uint64)[:, None] << 23 | np.array([0, 1, 0x400000, 0x7FFFFF], np.uint64)).ravel()
    values = bits.astype(np.uint32).view(np.float32)
    width = values.size
    padded = np.full((1, 9, width, 16), np.nan, np.float32)
    padded[:, 4:6] = 1
    offset = np.zeros((1, 2, width, 18), np.float32)
    offset[0, 0, :, 8] = values
    offset[0, 1, :, 9] = values
    mask = np.zeros((1, 2, width, 9), np.float32)
    mask[..., 4] = 1
    result = host.dcnv3(padded[:, 4:6], offset, mask, **(PLAIN | {"group": 1}))
    side = np.array([[width], [2]])
    with np.errstate(invalid="ignore"):
        position = np.stack([np.arange(width) + values.astype(np.float64), 1 + values.astype(np.float64)])
        fraction = np.clip(np.minimum(position + 1, side - position), 0, 1)
    np.testing.assert_allclose(result[0, ..., 0], np.nan_to_num(fraction), atol=1e-6)


@pytest.mark.parametrize("limit", ["at the limit", "above it"])
def test_side_limit(limit):
    width = 2**21 - 2 + (limit == "above it")
    shape = (1, 1, width, 1)
    input = np.ones(shape, np.float32)
    offset = np.zeros((1, 1, width, 18), np.float32)
    offset[..., 2**20 :, :] = 1e9
    arguments = (input, offset, np.ones((1, 1, width, 9), np.float32))
    op = PLAIN | {"group": 1}
    if limit == "above it":
        with pytest.raises(UserError, match="2097152"):
            host.dcnv3(*arguments, **op)
    else:
        result = host.dcnv3(*arguments, **op)
        assert result[0, 0, 1 : 2**20].min() == 3
        assert np.abs(result[0, 0, 2**20 :]).max() == 0


def test_images_beyond_32_bits():
    # Rows 3 GB apart, in memory that is reserved and hardly touched: byte offsets pass 2^32, element offsets 2^31.
    row = 3 * 2**29
    memory = np.zeros(2 * row, np.uint16).view(np.float16)
    input, offset, mask = draw(11, height=2, width=3, channels=16, **PLAIN)
    apart = np.lib.stride_tricks.as_strided(memory, (1, 2, 3, 32), (4 * row, 2 * row, 64, 2))
    apart[:] = input
    stored = [array.astype(np.float16) for array in (input, offset, mask)]
    params, output = host.make_params(apart, *stored[1:], **PLAIN)
    assert host.DCNV3.run(params, "float16").group == 0
    assert error(output, host.dcnv3(*stored, **PLAIN)) == 0
    # Images that far apart need no 64-bit indices inside an image.
    images = np.lib.stride_tricks.as_strided(memory, (2, 2, 3, 32), (2 * row, 192, 64, 2))
    images[:] = input
    twice = [np.concatenate([array, array]) for array in stored[1:]]
    params, output = host.make_params(images, *twice, **PLAIN)
    assert host.DCNV3.run(params, "float16").group == 16
    assert error(output, host.dcnv3(*stored, **PLAIN)) == 0


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def problems(draw_from):
    kernel, stride, dilation = draw_from(PAIRS), draw_from(PAIRS), draw_from(PAIRS)
    pad = draw_from(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    if draw_from(st.booleans()):
        kernel, channels = (3, 3), draw_from(st.sampled_from([16, 32]))
    else:
        channels = draw_from(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40]))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * pad[i]) for i in range(2)]
    return {
        "kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation,
        "group": draw_from(st.integers(1, 5)),
        "offset_scale": draw_from(st.sampled_from([0.5, 1.0, 2.0, 1.7])),
        "batch": draw_from(st.integers(1, 3)),
        "height": least[0] + draw_from(st.integers(0, 9)),
        "width": least[1] + draw_from(st.integers(0, 9)),
        "channels": channels,
        "softmax": draw_from(st.booleans()),
        "dtype": draw_from(st.sampled_from(list(NUMPY))),
        "tactic": draw_from(st.integers(0, LAST_TACTIC)),
        "seed": draw_from(st.integers(0, 2**32 - 1)),
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(problems())
def test_random_settings_agree_with_pytorch(problem):
    op = {k: problem[k] for k in ("kernel", "stride", "pad", "dilation", "group", "offset_scale")}
    sizes = {k: problem[k] for k in ("batch", "height", "width", "channels", "softmax")}
    dtype = problem["dtype"]
    stored = [array.astype(NUMPY[dtype]) for array in draw(problem["seed"], **sizes, **op)]
    result = host.dcnv3(*stored, mask_softmax=problem["softmax"], tactic=problem["tactic"], **op)
    expected = reference(*stored, mask_softmax=problem["softmax"], **op)
    unit = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=unit, atol=1e-5 if unit < 1e-5 else unit)


def test_the_last_tactic():
    # The strategies draw from 0 to this one, without compiling the library when they are collected.
    assert tactics() == LAST_TACTIC

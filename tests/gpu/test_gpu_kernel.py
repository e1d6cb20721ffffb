# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, against the float64 references and the same kernels on the host."""

import ctypes

import numpy as np
import pytest

from internimage_deploy.operators import ms_deform_attn
from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.host_operators import UpsampleArgmaxParams
from support import ms_deform_attn_cases as attention
from support.dcnv3_cases import CASES, DTYPES, assert_close, expected, operands
from support.device_memory import from_device, to_device


def on_host(case, arrays, tactic=0):
    return host.dcnv3(*arrays, tactic=tactic, allow_half=True, **case["op"])


def on_gpu(kernel, device, case, arrays, tactic=0):
    """The output of the DCNv3 kernel, through device memory and back."""
    params, output = host.make_params(*arrays, allow_half=True, **case["op"])
    names = ("input", "offset", "mask", "output")
    launch(kernel.dcnv3_launch, device, params, dict(zip(names, (*arrays, output), strict=True)), output, tactic)
    return output


def attention_on_gpu(kernel, device, arrays, tactic=0):
    """The output of the MSDeformAttn kernel, through device memory and back."""
    params, output, inputs = host.make_ms_deform_attn_params(*arrays)
    named = dict(zip(ms_deform_attn.INPUTS, inputs, strict=True)) | {"output": output}
    launch(kernel.ms_deform_attn_launch, device, params, named, output, tactic)
    return output


def labels_on_gpu(kernel, device, logits, tactic=0):
    """The output of the UpsampleArgmax kernel, through device memory and back."""
    batch, classes, height, width = logits.shape
    labels = np.full((batch, 4 * height, 4 * width), -1, np.int32)
    params = UpsampleArgmaxParams(batch=batch, classes=classes, height=height, width=width)
    arrays = {"logits": logits, "labels": labels}
    launch(kernel.upsample_argmax_launch, device, params, arrays, labels, tactic, logits.dtype.name)
    return labels


def launch(function, device, params, arrays, output, tactic, dtype=None):
    """Run a kernel on copies of the named arrays in device memory, the last of which is `output`."""
    memory = {}
    with device.current():
        for name, array in arrays.items():
            memory[name] = to_device(device, array)
            setattr(params, name, memory[name].address)
        code = host.DTYPES.index(dtype or output.dtype.name)
        assert function(ctypes.byref(params), code, tactic, None) == 0
        device.call("cuCtxSynchronize")
        from_device(device, memory[list(arrays)[-1]].address, output)
        for buffer in memory.values():
            buffer.free()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_host_kernel_on_the_same_cases(case, dtype):
    """Without a GPU: table, operands, reference and bounds fit together."""
    arrays = operands(case, dtype)
    assert_close(on_host(case, arrays), expected(case, arrays), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cuda_kernel(case, dtype, kernel, device):
    arrays = operands(case, dtype)
    result = on_gpu(kernel, device, case, arrays)
    assert_close(result, expected(case, arrays), dtype)
    assert_close(result, np.asarray(on_host(case, arrays), np.float64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES["batch"], CASES["softmax inside"]], ids=["16 channels", "32 channels, softmax"])
def test_every_tactic(case, dtype, kernel, device):
    arrays = operands(case, dtype)
    for tactic in range(1, kernel.dcnv3_tactics() + 1):
        same = np.asarray(on_host(case, arrays, tactic), np.float64)
        assert_close(on_gpu(kernel, device, case, arrays, tactic), same, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 19, 16, 24), (1, 150, 5, 7), (3, 4, 1, 1)], ids=str)
def test_labels_with_every_tactic(shape, dtype, kernel, device):
    logits = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    expected = host.upsample_argmax(logits)
    for tactic in range(kernel.dcnv3_tactics() + 1):
        np.testing.assert_array_equal(labels_on_gpu(kernel, device, logits, tactic), expected)


ATTENTION = {
    "three levels": {"batch": 2, "shapes": ((2, 3), (4, 6), (8, 12)), "queries": 126, "channels": 32, "heads": 8},
    "any points": {"shapes": ((5, 4), (1, 1)), "points": 3, "channels": 24},
    "odd channels": {"shapes": ((3, 3),), "channels": 5, "heads": 3, "spread": 2.0},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_the_cuda_kernel_of_attention_with_every_tactic(case, dtype, kernel, device):
    arrays = attention.stored(attention.draw(0, **case), dtype)
    for tactic in range(kernel.dcnv3_tactics() + 1):
        result = attention_on_gpu(kernel, device, arrays, tactic)
        assert_close(result, attention.reference(*arrays), dtype)


@pytest.mark.gpu
def test_attention_never_reads_outside_on_a_gpu(kernel, device):
    value, _, starts, locations, weights = attention.draw(1, shapes=((3, 4), (5, 2)), channels=32)
    locations[0, 1] = np.nan
    locations[0, 2] = np.inf
    locations[0, 3] = 1e30
    shapes = np.array([(3, 4), (2**30, 2**30)])
    arrays = value, shapes, starts, locations, weights
    assert_close(attention_on_gpu(kernel, device, arrays), attention.reference(*arrays), "float32")

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel on a GPU, against the float64 reference and the same kernel on the host."""

import ctypes

import numpy as np
import pytest

from internimage_deploy.trt_plugins import host
from support.dcnv3_cases import CASES, DTYPES, assert_close, expected, operands


def on_host(case, arrays, tactic=0):
    return host.dcnv3(*arrays, tactic=tactic, **case["op"])


def on_gpu(kernel, device, case, arrays, tactic=0):
    """The output of the CUDA kernel, through device memory and back."""
    params, output = host.make_params(*arrays, **case["op"])
    memory = {}
    with device.current():
        names = ("input", "offset", "mask", "output")
        for name, array in zip(names, (*arrays, output), strict=True):
            memory[name] = device.driver.mem_alloc(array.nbytes)
            device.driver.memcpy_htod(memory[name], array.view(np.uint8))
            setattr(params, name, int(memory[name]))
        dtype = host.DTYPES.index(output.dtype.name)
        assert kernel.dcnv3_launch(ctypes.byref(params), dtype, tactic, None) == 0
        device.driver.Context.synchronize()
        device.driver.memcpy_dtoh(output.view(np.uint8), memory["output"])
        for allocation in memory.values():
            allocation.free()
    return output


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
def test_every_tactic(dtype, kernel, device):
    case = CASES["batch"]
    arrays = operands(case, dtype)
    reference = expected(case, arrays)
    for tactic in range(1, kernel.dcnv3_tactics() + 1):
        assert_close(on_gpu(kernel, device, case, arrays, tactic), reference, dtype)

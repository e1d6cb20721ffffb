# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's own parser and compiler, which need no GPU, on exported files."""

import importlib.util
import subprocess
import sys

import pytest

from support.exports import DYNAMIC_LABELS, DYNAMIC_LOGITS, OPSET_16, STATIC

_MODULE = next((name for name in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(name)), None)

pytestmark = pytest.mark.skipif(
    _MODULE is None, reason="tensorrt-rtx is not installed (pip install internimage-deploy[rtx])"
)

# In a process of its own: the parser ends the process when it meets a node that it does not know.
BUILD = f"""
import sys
import {_MODULE} as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(sys.argv[1])
assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
config = builder.create_builder_config()
source = network.get_input(0)
if -1 in tuple(source.shape):
    profile = builder.create_optimization_profile()
    sizes = ((1, 32, 32), (1, 64, 96), (4, 96, 256))
    shapes = [(n, h, w, 3) if source.shape[3] == 3 else (n, 3, h, w) for n, h, w in sizes]
    profile.set_shape(source.name, *shapes)
    config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
assert engine is not None
print(network.get_output(0).name, network.get_output(0).dtype.name, tuple(network.get_output(0).shape), engine.nbytes)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(STATIC, ["labels", "UINT8", "(2, 64, 96)"], id="static-labels"),
        pytest.param(DYNAMIC_LABELS, ["labels", "UINT8", "(-1, -1, -1)"], id="dynamic-labels"),
        pytest.param(DYNAMIC_LOGITS, ["logits", "FLOAT", "(-1, 19, -1, -1)"], id="dynamic-logits"),
        pytest.param(OPSET_16, ["logits", "FLOAT", "(1, 5, 16, 8)"], id="static-logits-opset-16"),
    ],
)
def test_tensorrt_rtx_compiles_the_file(source, expected, exports):
    path = exports(*source).path
    done = subprocess.run([sys.executable, "-c", BUILD, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, kind, *shape, size = done.stdout.split()
    assert [name, kind, " ".join(shape)] == expected
    assert int(size) > 10_000

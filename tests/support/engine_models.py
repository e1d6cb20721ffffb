# SPDX-License-Identifier: Apache-2.0
"""Exported models to convert and compile, each made once per test run."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.cli import main as cli
from internimage_deploy.onnx_tools.graph import Graph
from internimage_deploy.runtime.engine.compilers import Compiler, find
from support import golden

FOLDER = Path(tempfile.mkdtemp(prefix="engine-models-"))
# The models that several tests share; exporting one takes seconds.
DYNAMIC = ("upernet_t_like", "--dynamic")
DYNAMIC_LOGITS = (*DYNAMIC, "--emit", "logits")
STATIC_LOGITS = ("upernet_l_like", "--size", "64x96", "--input", "float", "--emit", "logits")
T = "upernet_internimage_t_512_160k_ade20k"


@cache
def exported(name, *options):
    """ONNX file of a golden network, or of a released architecture with random weights."""
    count = len(list(FOLDER.glob("*.onnx")))
    target = FOLDER / f"{name}-{count}.onnx"
    if name in golden.NETWORKS:
        source = ["--ckpt", golden.checkpoint(name, FOLDER / f"{name}.pth")]
    else:
        source = ["--random", name]
    arguments = ["export-onnx", *source, "-o", target, "--no-verify", *options]
    with pytest.raises(SystemExit) as exit_:
        cli.run(cli.group, [str(argument) for argument in arguments])
    assert not exit_.value.code
    return target


def graph_of(path):
    """A fresh `Graph` of the file."""
    return Graph(onnx.load(str(path), load_external_data=False), Path(path).parent)


def rtx():
    """TensorRT-RTX, which the tests need."""
    compiler = find("tensorrt-rtx")
    assert isinstance(compiler, Compiler), f"the tests build real engines: {compiler}"
    return compiler


def single(op_type, inputs, outputs, *, opset=20, constants=None, domain="", **attributes):
    """A `Graph` of one node; inputs and outputs are {name: (type, shape)}."""
    node = helper.make_node(op_type, [*inputs, *(constants or {})], list(outputs), "it", domain=domain, **attributes)
    return small([node], inputs, outputs, opset=opset, constants=constants, domains=(domain,) if domain else ())


def small(nodes, inputs, outputs, *, opset=20, constants=None, domains=()):
    """A `Graph` of `nodes`."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return Graph(helper.make_model(graph, opset_imports=imports, ir_version=9), FOLDER)


def compute(graph, **inputs):
    """The first output of a graph in ONNX Runtime."""
    import onnxruntime as ort

    onnx.checker.check_model(graph.model)
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


FLOAT = TensorProto.FLOAT


def normal(*shape, seed=0, scale=1.0):
    """float32 numbers of a normal distribution."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def official(opset=11):
    """A small network as the official exporter writes one: old operators, decomposed norm, `mmdeploy::TRTDCNv3`."""
    channels, groups, points = 16, 2, 9
    constants = {
        "stem": normal(channels, 3, 4, 4, scale=0.1),
        "offset_weight": normal(channels, groups * points * 2, scale=0.1, seed=1),
        "mask_weight": normal(channels, groups * points, scale=0.1, seed=2),
        "classes": normal(5, channels, 1, 1, seed=3),
        "epsilon": np.float32(1e-6),
        "two": np.float32(2),
        "split": np.int64([1, 8, 8, groups, points]),
        "join": np.int64([1, 8, 8, groups * points]),
        "roi": np.float32([]),
        "scales": np.float32([1, 1, 4, 4]),
    }
    numbers = {f"{name}_{axis}": value for name, value in DCNV3.items() for axis in "hw"}
    numbers |= {"group": groups, "group_channels": channels // groups, "offset_scale": 1.0, "im2col_step": 256}
    n = helper.make_node
    nodes = [
        n("Conv", ["input", "stem"], ["f"], "stem", kernel_shape=[4, 4], strides=[4, 4]),
        n("Transpose", ["f"], ["x"], "nhwc", perm=[0, 2, 3, 1]),
        n("ReduceMean", ["x"], ["mean"], "mean", axes=[-1]),
        n("Sub", ["x", "mean"], ["centred"], "centre"),
        n("Pow", ["centred", "two"], ["squares"], "square"),
        n("ReduceMean", ["squares"], ["variance"], "variance", axes=[-1]),
        n("Add", ["variance", "epsilon"], ["positive"], "positive"),
        n("Sqrt", ["positive"], ["deviation"], "root"),
        n("Div", ["centred", "deviation"], ["normal"], "divide"),
        n("MatMul", ["normal", "offset_weight"], ["offset"], "offset"),
        n("MatMul", ["normal", "mask_weight"], ["logits"], "mask"),
        n("Reshape", ["logits", "split"], ["grouped"], "split"),
        n("Softmax", ["grouped"], ["weights"], "softmax", axis=4),
        n("Reshape", ["weights", "join"], ["joined"], "join"),
        n("TRTDCNv3", ["normal", "offset", "joined"], ["y"], "dcn", domain="mmdeploy", **numbers),
        n("Transpose", ["y"], ["nchw"], "nchw", perm=[0, 3, 1, 2]),
        n("Conv", ["nchw", "classes"], ["scores"], "classify", kernel_shape=[1, 1]),
        n("Resize", ["scores", "roi", "scales"], ["upsampled"], "upsample", mode="linear"),
        n("ArgMax", ["upsampled"], ["output"], "best", axis=1, keepdims=1),
    ]
    shapes = {"input": (FLOAT, [1, 3, 32, 32])}, {"output": (TensorProto.INT64, [1, 1, 32, 32])}
    return small(nodes, *shapes, opset=opset, constants=constants, domains=("mmdeploy",))


DCNV3 = {"kernel": 3, "stride": 1, "pad": 1, "dilation": 1}

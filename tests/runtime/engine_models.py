# SPDX-License-Identifier: Apache-2.0
"""Exported models to convert and compile, each made once per test run."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import golden
from internimage_deploy import cli
from internimage_deploy.runtime.engine.compilers import Compiler, find
from internimage_deploy.runtime.engine.graph import Graph

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


def answer(graph, **inputs):
    """What ONNX Runtime computes for a graph, its first output."""
    import onnxruntime as ort

    onnx.checker.check_model(graph.model)
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


FLOAT = TensorProto.FLOAT


def normal(*shape, seed=0, scale=1.0):
    """float32 numbers of a normal distribution."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)

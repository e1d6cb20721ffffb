# SPDX-License-Identifier: Apache-2.0
"""Checks of engines that run on a GPU, and without one on the stand-ins for TensorRT and CUDA."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.operators import contract
from internimage_deploy.runtime.backends.fastest import sample
from internimage_deploy.runtime.engine.compile import compile_engine, make_logger
from internimage_deploy.runtime.engine.operators import parser_of
from internimage_deploy.runtime.engine.protocol import ExpectedTensor, Job
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext
from support.dcnv3_cases import operands, pair

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def one_node_model(case, dtype, path):
    """Write a model "x" -> "y", both float32, of one DCNv3 plugin node in `dtype`; offset and mask are constants.

    Returns the operands as the node gets them.
    """
    input, offset, mask = operands(case, dtype)
    op = case["op"]
    attributes = {
        f"{name}_{axis}": value
        for name in ("kernel", "stride", "pad", "dilation")
        for axis, value in zip("hw", pair(op[name]), strict=True)
    }
    attributes |= {"group": op["group"], "group_channels": case["size"][3], "offset_scale": float(op["offset_scale"])}
    attributes |= {"mask_softmax": int(op.get("mask_softmax", False))}
    attributes |= {"plugin_version": contract.PLUGIN_VERSION, "plugin_namespace": contract.PLUGIN_NAMESPACE}
    nodes = [
        helper.make_node("Cast", ["x"], ["input"], "to_type", to=TYPES[dtype]),
        helper.make_node(
            contract.OP_TYPE, ["input", "offset", "mask"], ["output"], "dcn", domain=contract.DOMAIN, **attributes
        ),
        helper.make_node("Cast", ["output"], ["y"], "to_float", to=TensorProto.FLOAT),
    ]
    result_shape = (*offset.shape[:3], input.shape[3])
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result_shape)],
        [_initializer(offset, "offset", dtype), _initializer(mask, "mask", dtype)],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString())
    return input, offset, mask


def _initializer(array, name, dtype):
    if dtype != "bfloat16":
        return numpy_helper.from_array(array, name)
    return onnx.TensorProto(name=name, data_type=TYPES[dtype], dims=array.shape, raw_data=array.tobytes())


def one_node_outputs(trt, device, case, dtype, plugin, folder, runs=3):
    """Build an engine of one DCNv3 node and run it.

    Args:
        trt: the module `tensorrt`.
        device: an open `Device`.
        case: of `dcnv3_cases.CASES`.
        dtype: element type of the node.
        plugin: path of the plugin library.
        folder: where model and engine are written.
        runs: the second captures a CUDA graph, the others replay it.

    Returns:
        The operands of the node, and the output (N, Ho, Wo, G*C) of each run.
    """
    model, engine_path = folder / "one.onnx", folder / "one.engine"
    arrays = one_node_model(case, dtype, model)
    x = arrays[0].astype(np.float32)
    strongly_typed = parser_of("tensorrt", trt.__version__).strongly_typed
    job = Job(
        "tensorrt",
        str(model),
        str(model),
        str(engine_path),
        ExpectedTensor("x", "float32", x.shape),
        flags=() if strongly_typed or dtype == "float32" else ({"float16": "FP16", "bfloat16": "BF16"}[dtype],),
        strongly_typed=strongly_typed,
        plugin=str(plugin),
    )
    errors = []
    with device.current():
        compile_engine(trt, job, lambda event: None, threading.Event())
        logger = make_logger(trt, lambda event: None)
        logger.errors = errors
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(Path(engine_path).read_bytes())
        assert engine is not None, errors
        context = ExecutionContext(
            device, engine.create_execution_context(), ("x", "y"), "float32", True, errors, has_profiles=False
        )
        outputs = []
        for _ in range(runs):
            context.start(x, 0)
            outputs.append(context.finish())
        context.close()
    return arrays, outputs


def assert_two_threads_agree_with_one(backend, size, rounds=10):
    """Two threads that run different batches at the same time get the outputs of each batch run alone."""
    first = sample(backend.card, size)
    batches = [first, np.ascontiguousarray(np.flip(first, axis=tuple(range(1, first.ndim))))]
    alone = [backend.run(batch) for batch in batches]
    assert not np.array_equal(*alone)
    together = threading.Barrier(2)

    def run(index):
        together.wait(60)
        return [backend.run(batches[index]) for _ in range(rounds)]

    with ThreadPoolExecutor(2) as pool:
        for output, found in zip(alone, pool.map(run, range(2)), strict=True):
            for one in found:
                np.testing.assert_array_equal(one, output)

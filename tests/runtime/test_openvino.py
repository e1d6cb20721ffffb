# SPDX-License-Identifier: Apache-2.0
import json
import threading

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from internimage_deploy.cli.benchmark import benchmark
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.segmenter import Segmenter
from support.tiny_models import color_model, picture

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'internimage-deploy[openvino]'")


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "labels"])
def test_openvino_agrees_with_onnx_runtime(tmp_path, labels):
    path = tmp_path / "model.onnx"
    color_model(path, labels=labels)
    image, _ = picture(64, 96)
    labels_of = {}
    for backend in ("onnxruntime", "openvino"):
        with Segmenter.load(path, backend=backend, threads=1) as segmenter:
            labels_of[backend] = segmenter(image).labels
    np.testing.assert_array_equal(labels_of["openvino"], labels_of["onnxruntime"])
    assert len(np.unique(labels_of["openvino"])) == 3


def test_openvino_inlines_model_local_functions(tmp_path):
    path = tmp_path / "model.onnx"
    color_model(path, size=(64, 64), batch=1, uint8=False)
    expected = load_backend(path, "onnxruntime", threads=1).run(np.ones((1, 3, 64, 64), np.float32))
    model = onnx.load(path)
    last = model.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    body = helper.make_node("Neg", ["x"], ["y"])
    function = helper.make_function("own", "Minus", ["x"], ["y"], [body], [helper.make_opsetid("", 20)])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Minus", ["before"], [name], domain="own"))
    onnx.save(model, path)
    output = load_backend(path, "openvino", threads=1).run(np.ones((1, 3, 64, 64), np.float32))
    np.testing.assert_allclose(output, -expected, rtol=1e-5, atol=1e-3)


def test_openvino_serves_several_threads(tmp_path):
    path = tmp_path / "model.onnx"
    color_model(path, size=(64, 64), batch=1, uint8=False)
    backend = load_backend(path, "openvino", threads=1)
    inputs = [np.full((1, 3, 64, 64), value, np.float32) for value in range(4)]
    expected = [backend.run(x) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(20):
            if not np.array_equal(backend.run(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_openvino_explains_what_it_cannot_load(tmp_path):
    path = tmp_path / "model.onnx"
    color_model(path, size=(64, 64), batch=1)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="OpenVINO cannot load this model"):
        load_backend(path, "openvino")


def test_benchmark_compares_backends_and_prints_json(tmp_path):
    path = tmp_path / "model.onnx"
    color_model(path)
    arguments = [str(path), "--backend", "onnxruntime", "--backend", "openvino", "--size", "64x96"]
    done = CliRunner().invoke(benchmark, [*arguments, "--runs", "3", "--json"], catch_exceptions=False)
    report = json.loads(done.output)
    assert report["input"][0] == 1
    assert {"machine", "versions", "command"} <= set(report)
    assert set(report["backends"]) == {"onnxruntime", "openvino"}
    assert all(row["runs"] == 3 and row["labels_differ"] == 0 for row in report["backends"].values())

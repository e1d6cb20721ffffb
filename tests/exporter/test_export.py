# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re
import weakref
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.errors import UserError
from internimage_deploy.exporter import export as export_module
from internimage_deploy.exporter import rewrites
from internimage_deploy.exporter.export import export, export_model
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.verify import FREE_SIZES
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.operators import contract
from support import golden
from support.exports import DYNAMIC_LABELS, DYNAMIC_LOGITS, OPSET_16, STATIC
from support.small_models import (
    golden_segmentor,
    in_pytorch,
    random_input,
    run,
    session,
    source_model,
    tiny_segmentor,
)

# The free sizes of one network, because tracing them takes long.
FIXED_SIZE = tuple(name for name in golden.NETWORKS if name != DYNAMIC_LOGITS[0])


@pytest.fixture(scope="module")
def static_file(exports):
    """Two images of 64x96, uint8 in, labels out, with the segmentor it was made from."""
    return exports(*STATIC), tiny_segmentor()


@pytest.fixture(scope="module")
def dynamic_file(exports):
    """The path of a golden network's export with every size free."""
    return exports(*DYNAMIC_LOGITS).path


def test_logits_equal_the_official_ones(dynamic_file):
    name = DYNAMIC_LOGITS[0]
    logits = run(session(dynamic_file), golden.network_input(name))
    np.testing.assert_allclose(logits, golden.arrays(name)["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_static_logits_equal_the_official_ones(name, exports):
    x = golden.network_input(name)
    options = ExportOptions(size=x.shape[2:], batch=len(x), input="float", emit="logits")
    logits = run(session(exports(name, options).path), x)
    np.testing.assert_allclose(logits, golden.arrays(name)["logits"], atol=1e-4, rtol=0)


# The smallest allowed, flat, upright, the traced one, larger ones, and batches of one to four.
SIZES = [(1, 32, 32), (2, 32, 224), (3, 192, 64), (2, 96, 160), (4, 256, 320), (3, 512, 224)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_one_dynamic_file_is_right_at_every_size(size, dynamic_file):
    x = random_input(*size)
    expected = in_pytorch(golden_segmentor(DYNAMIC_LOGITS[0]), x)
    np.testing.assert_allclose(run(session(dynamic_file), x), expected, atol=1e-5 * np.ptp(expected), rtol=0)


def test_a_dynamic_file_of_the_other_head_is_right_at_every_size(exports):
    report = exports(*DYNAMIC_LABELS).report
    assert [comparison.shape for comparison in report.comparisons] == list(FREE_SIZES)
    assert report.error <= 1e-5
    assert all(comparison.agreement > 0.9999 for comparison in report.comparisons)


def test_uint8_input_is_normalised_and_labels_are_computed_at_network_size(static_file):
    exported, segmentor = static_file
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), np.uint8)
    normal = ((pixels - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)).transpose(0, 3, 1, 2).astype(np.float32)
    scores = F.interpolate(torch.from_numpy(in_pytorch(segmentor, normal)), size=(64, 96), mode="bilinear")
    best, second = scores.topk(2, dim=1).values.unbind(dim=1)
    clear = (best - second > 1e-3).numpy()
    labels = run(session(exported.path), pixels)
    assert labels.dtype == np.uint8
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], scores.argmax(dim=1).numpy()[clear])


def test_more_classes_than_a_byte_holds(tmp_path):
    options = ExportOptions(size=(32, 32), batch=1, input="float")
    model = source_model(tiny_segmentor("SegformerHead", classes=257))
    exported = export_model(model, options, tmp_path / "m.onnx")
    x = random_input(1, 32, 32)
    labels = run(session(exported.path), x)
    assert labels.dtype == np.int32
    assert exported.card.output.dtype == "int32"


@pytest.mark.parametrize("opset", [16, 18])
def test_other_opsets(opset, exports):
    name, options = OPSET_16
    exported = exports(name, dataclasses.replace(options, opset=opset))
    model = onnx.load(exported.path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset, contract.DOMAIN: 1}
    assert ("LayerNormalization" in {node.op_type for node in model.graph.node}) == (opset >= 17)
    x = random_input(1, 64, 32)
    expected = in_pytorch(tiny_segmentor(center_feature_scale=True), x)
    np.testing.assert_allclose(run(session(exported.path), x), expected, atol=1e-4, rtol=0)


def test_weights_beyond_the_limit_go_into_a_file_beside(tmp_path):
    options = ExportOptions(size=(32, 32), batch=1, input="float", emit="logits")
    target = tmp_path / "m.onnx"
    model = source_model(tiny_segmentor("SegformerHead"))
    exported = export_model(model, options, target, external_data_above=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert exported.external_data == tmp_path / "m.onnx.data"
    assert target.stat().st_size < exported.external_data.stat().st_size
    onnx.checker.check_model(str(target), full_check=True)
    x = random_input(1, 32, 32)
    expected = in_pytorch(tiny_segmentor("SegformerHead"), x)
    np.testing.assert_allclose(run(session(target), x), expected, atol=1e-4, rtol=0)


def test_the_weights_are_freed_before_the_file_is_run(tmp_path, monkeypatch):
    """Both at once would not fit into the memory that the largest models need by themselves."""
    model = source_model(tiny_segmentor())
    weights = [weakref.ref(weight.untyped_storage()) for weight in model.segmentor.parameters()]
    assert all(weight() is not None for weight in weights)
    alive = []
    monkeypatch.setattr(
        export_module, "compare", lambda *_: alive.append(sum(weight() is not None for weight in weights))
    )
    export_model(model, ExportOptions(size=(32, 32), batch=1), tmp_path / "m.onnx")
    assert alive == [0]


def test_nodes_follow_the_contract(dynamic_file):
    model = onnx.load(dynamic_file)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.op_type == contract.OP_TYPE]
    config = golden_segmentor("upernet_t_like").config.backbone
    assert len(nodes) == sum(config.depths)
    names = [attribute.name for attribute in contract.ATTRIBUTES]
    for node in nodes:
        assert node.domain == contract.DOMAIN
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert sorted(values) == sorted(names)
        level = int(re.search(r"levels\.(\d)", node.name)[1])
        assert (values["group"], values["group_channels"]) == (config.groups[level], 16)
        assert values["offset_scale"] == config.offset_scale
    assert [(f.domain, f.name) for f in model.functions] == [(contract.DOMAIN, contract.OP_TYPE)]


def test_types_are_known_behind_every_node(dynamic_file):
    model = onnx.load(dynamic_file)
    known = {info.name for info in (*model.graph.value_info, *model.graph.output)}
    produced = {name for node in model.graph.node for name in node.output}
    assert produced <= known


def test_names_are_module_paths(static_file):
    exported, segmentor = static_file
    rewrites.apply(segmentor, STATIC[1])
    model = onnx.load(exported.path)
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    modules = {name for name, _ in segmentor.named_modules()} | {"preprocess", "postprocess"}
    strangers = [name for name in nodes if name.rpartition("/")[0] not in modules]
    assert strangers == []
    node = nodes["backbone.levels.2.blocks.0.dcn/DCNv3"]
    assert list(node.output) == [node.name]
    weights = {tensor.name for tensor in model.graph.initializer}
    assert "backbone.levels.0.blocks.0.dcn.dw_conv.0.weight" in weights
    assert not [name for name in weights if re.match(r"val_|node|_", name)]


def test_nothing_tells_of_the_machine_or_the_tracer(static_file, dynamic_file):
    for path in (static_file[0].path, dynamic_file):
        model = onnx.load(path)
        assert [entry.key for entry in model.metadata_props] == ["internimage_deploy"]
        assert (model.producer_name, model.doc_string, model.graph.doc_string) == ("internimage-deploy", "", "")
        parts = [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
        parts += [*model.graph.initializer, model.graph]
        assert not [part.name for part in parts if part.metadata_props]
        del model.graph.initializer[:]
        text = model.SerializeToString()
        for word in (b"torch.onnx", b"Traceback", b".py", b"site-packages", b"/home/", b"/tmp/", b"/opt/", b"/root/"):
            assert word not in text, word


def test_card_describes_the_file(static_file, dynamic_file):
    card = read_card(static_file[0].path)
    assert card.to_json() == static_file[0].card.to_json()
    assert (card.network_size, card.batch, card.takes_uint8, card.emits_labels) == ((64, 96), 2, True, True)
    dynamic = read_card(dynamic_file)
    assert dynamic.is_dynamic
    assert dynamic.batch is None
    model = onnx.load(dynamic_file)
    for info, spec in ((model.graph.input[0], dynamic.input), (model.graph.output[0], dynamic.output)):
        shape = tuple(dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim)
        assert (info.name, shape) == (spec.name, spec.shape)
        assert info.type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (48, 64)}, "multiples of 32"),
        ({"size": 512}, r"got 512, expected \(height, width\)"),
        ({"size": (0, 64)}, "multiples of 32"),
        ({"batch": 0}, "at least 1"),
        ({"opset": 15}, "one of 16, 17, 18"),
        ({"input": "uint16"}, "one of uint8, float"),
        ({"emit": "masks"}, "one of labels, logits"),
    ],
    ids=["size", "one side", "empty", "batch", "opset", "input", "emit"],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        ExportOptions(**wrong)


def test_export_in_one_call_writes_what_the_command_writes(tmp_path, caplog):
    """The Python API; the command adds nothing but printing (test_export_command.py)."""
    checkpoint = golden.checkpoint("segformer_l_like", tmp_path / "model.pth", with_meta=False)
    steps = []

    @contextmanager
    def progress(step):
        steps.append(step)
        yield

    with caplog.at_level("INFO", "internimage_deploy.exporter"):
        exported = export(
            str(checkpoint),
            str(tmp_path / "m.onnx"),
            size=(32, 32),
            offset_scale=2,
            without=["layer-scale"],
            progress=progress,
        )
    assert steps == ["loading", "reference", "tracing", "optimising", "writing", "checking", "verifying"]
    assert read_card(exported.path).to_json() == exported.card.to_json()
    assert (exported.card.network_size, exported.card.batch) == ((32, 32), 1)
    assert "layer-scale" not in exported.card.rewrites
    assert exported.external_data is None
    assert exported.report.error < 1e-4
    assert any("the checkpoint names no classes" in note for note in exported.notes)
    assert [f"note: {note}" for note in exported.notes] == caplog.messages


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "either a checkpoint or the name of a released model"),
        ({"checkpoint": "m.pth", "random": "x"}, "either a checkpoint or the name of a released model"),
        ({"random": "resnet50"}, "no released model is called 'resnet50'; expected one of upernet_"),
        ({"random": "x", "output": "m.pth"}, r"name it .*m\.pth\.onnx"),
        ({"checkpoint": "none.pth"}, "none.pth does not exist"),
        ({"checkpoint": "m.pth", "without": ["magic"]}, "no rewrite is called 'magic'"),
        ({"checkpoint": "m.pth", "size": (100, 64)}, "multiples of 32"),
    ],
    ids=["no source", "two sources", "unknown model", "ending", "no file", "rewrite", "size"],
)
def test_wrong_calls_of_export_are_user_errors(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export(**({"checkpoint": None, "output": "m.onnx"} | wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_place_of_a_checkpoints_path(tmp_path):
    with pytest.raises(UserError, match="checkpoint: got Linear, expected the path"):
        export(torch.nn.Linear(1, 1), tmp_path / "m.onnx")

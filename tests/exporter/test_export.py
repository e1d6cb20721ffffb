# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter import rewrites
from internimage_deploy.exporter.export import export
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.operators import contract
from support import golden
from support.small_models import facts, golden_segmentor, in_pytorch, random_input, run, session, tiny_segmentor

STATIC_OPTIONS = ExportOptions(size=(64, 96), batch=2)


@pytest.fixture(scope="module")
def dynamic_golden(tmp_path_factory):
    """Answers the path of a golden network's export with every size free; each is exported once."""
    paths = {}

    def path_of(name):
        if name not in paths:
            segmentor = golden_segmentor(name)
            paths[name] = tmp_path_factory.mktemp("dynamic") / f"{name}.onnx"
            options = ExportOptions(input="float", emit="logits")
            export(segmentor, options, facts(segmentor.config.head.num_classes, name), paths[name])
        return paths[name]

    return path_of


@pytest.fixture(scope="module")
def static_file(tmp_path_factory):
    """Two pictures of 64x96, uint8 in, labels out, with the segmentor it was made from."""
    path = tmp_path_factory.mktemp("static") / "static.onnx"
    exported = export(tiny_segmentor(), STATIC_OPTIONS, facts(5), path)
    return exported, tiny_segmentor()


DYNAMIC = ("upernet_t_like",)  # one, because tracing free sizes takes long
STATIC = tuple(sorted(set(golden.NETWORKS) - set(DYNAMIC)))


@pytest.mark.parametrize("name", DYNAMIC)
def test_logits_equal_the_official_ones(name, dynamic_golden):
    answer = run(session(dynamic_golden(name)), golden.network_input(name))
    np.testing.assert_allclose(answer, golden.arrays(name)["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STATIC)
def test_static_logits_equal_the_official_ones(name, tmp_path):
    segmentor, x = golden_segmentor(name), golden.network_input(name)
    options = ExportOptions(size=x.shape[2:], batch=len(x), input="float", emit="logits")
    export(segmentor, options, facts(segmentor.config.head.num_classes), tmp_path / "m.onnx", check=None)
    answer = run(session(tmp_path / "m.onnx"), x)
    np.testing.assert_allclose(answer, golden.arrays(name)["logits"], atol=1e-4, rtol=0)


# The smallest allowed, flat, upright, the traced one, one larger than it, and batches of one to four.
SIZES = [(1, 32, 32), (2, 32, 224), (3, 192, 64), (2, 96, 160), (4, 256, 320)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_one_dynamic_file_is_right_at_every_size(size, dynamic_golden):
    x = random_input(*size)
    answer = run(session(dynamic_golden("upernet_t_like")), x)
    np.testing.assert_allclose(answer, in_pytorch(golden_segmentor("upernet_t_like"), x), atol=1e-4, rtol=0)


def test_uint8_input_is_normalised_and_labels_are_decided_at_network_size(static_file):
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
    exported = export(tiny_segmentor("SegformerHead", classes=257), options, facts(257), tmp_path / "m.onnx")
    x = random_input(1, 32, 32)
    labels = run(session(exported.path), x)
    assert labels.dtype == np.int32
    assert exported.card.output.dtype == "int32"


@pytest.mark.parametrize("opset", [16, 18])
def test_other_opsets(opset, tmp_path):
    options = ExportOptions(size=(64, 32), batch=1, input="float", emit="logits", opset=opset)
    exported = export(tiny_segmentor(center_feature_scale=True), options, facts(5), tmp_path / "m.onnx")
    model = onnx.load(exported.path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset, contract.DOMAIN: 1}
    assert ("LayerNormalization" in {node.op_type for node in model.graph.node}) == (opset >= 17)
    x = random_input(1, 64, 32)
    expected = in_pytorch(tiny_segmentor(center_feature_scale=True), x)
    np.testing.assert_allclose(run(session(exported.path), x), expected, atol=1e-4, rtol=0)


def test_weights_beyond_the_limit_go_into_a_file_beside(tmp_path):
    options = ExportOptions(size=(32, 32), batch=1, input="float", emit="logits")
    target = tmp_path / "m.onnx"
    exported = export(tiny_segmentor(), options, facts(5), target, external_data_above=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert exported.external_data == tmp_path / "m.onnx.data"
    assert target.stat().st_size < exported.external_data.stat().st_size
    onnx.checker.check_model(str(target), full_check=True)
    x = random_input(1, 32, 32)
    np.testing.assert_allclose(run(session(target), x), in_pytorch(tiny_segmentor(), x), atol=1e-4, rtol=0)


def test_nodes_follow_the_contract(dynamic_golden):
    model = onnx.load(dynamic_golden("upernet_t_like"))
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


def test_types_are_known_behind_every_node(dynamic_golden):
    model = onnx.load(dynamic_golden("upernet_t_like"))
    known = {info.name for info in (*model.graph.value_info, *model.graph.output)}
    produced = {name for node in model.graph.node for name in node.output}
    assert produced <= known


def test_names_are_module_paths(static_file):
    exported, segmentor = static_file
    rewrites.apply(segmentor, STATIC_OPTIONS)
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


def test_nothing_tells_of_the_machine_or_the_tracer(static_file, dynamic_golden):
    for path in (static_file[0].path, dynamic_golden("upernet_t_like")):
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


def test_card_describes_the_file(static_file, dynamic_golden):
    card = read_card(static_file[0].path)
    assert card.to_json() == static_file[0].card.to_json()
    assert (card.network_size, card.batch, card.takes_uint8, card.emits_labels) == ((64, 96), 2, True, True)
    dynamic = read_card(dynamic_golden("upernet_t_like"))
    assert dynamic.is_dynamic
    assert dynamic.batch is None
    model = onnx.load(dynamic_golden("upernet_t_like"))
    for info, spec in ((model.graph.input[0], dynamic.input), (model.graph.output[0], dynamic.output)):
        shape = tuple(dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim)
        assert (info.name, shape) == (spec.name, spec.shape)
        assert info.type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (48, 64)}, "multiples of 32"),
        ({"size": (0, 64)}, "multiples of 32"),
        ({"batch": 0}, "at least 1"),
        ({"opset": 15}, "one of 16, 17, 18"),
    ],
    ids=["size", "empty", "batch", "opset"],
)
def test_options_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**wrong)

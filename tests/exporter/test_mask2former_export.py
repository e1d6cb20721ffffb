# SPDX-License-Identifier: Apache-2.0
"""Exported Mask2Former models in ONNX Runtime, against the official implementation and against PyTorch."""

import numpy as np
import onnx
import pytest
import torch

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.verify import Check, compare, make_references
from internimage_deploy.onnx_tools.cost import multiply_adds
from support import golden
from support.small_models import golden_segmentor, run, session

FREE = ExportOptions(input="float", emit="logits")
SIZES = ((1, 32, 32), (3, 32, 64), (1, 96, 32), (2, 64, 64), (1, 128, 160), (1, 224, 96), (4, 64, 96), (1, 160, 288))


@pytest.mark.parametrize("name", golden.MASK2FORMER)
def test_a_file_of_free_size_equals_the_official_model(name, exports):
    expected = golden.arrays(name)["logits"]
    scores = run(session(exports(name, FREE).path), golden.network_input(name))
    assert np.abs(scores - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "rewritten"])
def test_a_file_of_fixed_size_equals_the_official_model(plain, exports):
    expected, size = golden.arrays("m2f_h_like"), tuple(golden.case("m2f_h_like")["input"][2:])
    path = exports("m2f_h_like", ExportOptions(size=size, input="float", plain=plain)).path
    labels = run(session(path), golden.network_input("m2f_h_like"))
    clear = expected["margin"] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], expected["labels_network_size"][clear])


def test_one_file_takes_every_size_and_batch(exports):
    # PyTorch at each size, under its own attention masks: see exporter/decisions.py.
    exported = exports("m2f_h_like", FREE)
    segmentor = golden_segmentor("m2f_h_like")
    for batch, height, width in SIZES:
        options = ExportOptions(size=(height, width), batch=batch, input="float", emit="logits")
        report = compare(exported.path, exported.card, make_references(segmentor, options))
        assert report.error <= 2e-4


def test_a_wrong_mask_is_found(exports, tmp_path):
    # The masks' comparison turned round: every number after it is checked under PyTorch's masks, the mask itself not.
    exported = exports("m2f_h_like", FREE)
    model = onnx.load(exported.path)
    wrong = [node for node in model.graph.node if node.op_type == "Less" and "decision" in node.name][1]
    wrong.op_type = "Greater"
    onnx.save(model, tmp_path / "wrong.onnx")
    references = make_references(golden_segmentor("m2f_h_like"), ExportOptions(size=(64, 96), input="float"), Check())
    with pytest.raises(UserError, match="attention mask of decoder layer 1 are not PyTorch's"):
        compare(tmp_path / "wrong.onnx", exported.card, references)


def test_the_graph_has_one_node_for_each_attention_and_nothing_that_depends_on_data(exports):
    model = onnx.load(exports("m2f_h_like", FREE).path)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MSDeformAttn") == 2
    assert not {"NonZero", "ScatterND", "GatherND", "Loop", "If"} & set(operators)
    assert {function.name for function in model.functions} == {"DCNv3", "MSDeformAttn"}


def test_multiply_adds_of_the_rewrites(exports):
    # By hand for m2f_h_like at 64x96: D = C = 64, Q = 20, maps of 16x24, 8x12, 4x6, 2x3; three decoder layers.
    size = tuple(golden.case("m2f_h_like")["input"][2:])
    cost = {}
    for plain in (True, False):
        exported = exports("m2f_h_like", ExportOptions(size=size, input="float", plain=plain))
        cost[plain] = multiply_adds(onnx.load(exported.path), exported.card, size, exported.path.parent)
    assert cost[True]["MSDeformAttn"] == cost[False]["MSDeformAttn"] == 2 * 126 * 64 * 3 * 4 * 5
    removed = sum(cost[True].values()) - sum(cost[False].values())
    assert removed > 0
    mask_feature = 64 * 64 * 384
    assert cost[True]["Conv"] - cost[False]["Conv"] >= mask_feature


def test_batches_are_those_of_single_images(exports):
    opened = session(exports("m2f_h_narrow_like", FREE).path)
    x = golden.network_input("m2f_h_narrow_like")
    together = run(opened, x)
    for index in range(len(x)):
        np.testing.assert_allclose(run(opened, x[index : index + 1])[0], together[index], atol=1e-4)


def test_masks_that_are_full_are_cleared_in_the_file(exports):
    case = golden.case("m2f_h_narrow_like")
    assert min(case["fully_masked_rows"]) > 0  # the golden comparison above would fail without the rule
    exported = exports("m2f_h_narrow_like", FREE)
    assert np.isfinite(run(session(exported.path), np.zeros((1, 3, 64, 64), np.float32))).all()
    assert torch.isfinite(torch.from_numpy(golden.arrays("m2f_h_narrow_like")["logits"])).all()

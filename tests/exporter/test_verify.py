# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import onnx
import pytest

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.export import export_model
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.verify import Check, compare, make_references
from support.exports import STATIC
from support.small_models import source_model, tiny_segmentor


@pytest.fixture(scope="module")
def exported(exports):
    return exports(*STATIC)


@pytest.fixture(scope="module")
def reference():
    (reference,) = make_references(tiny_segmentor(), STATIC[1])
    return reference


def test_report_of_a_right_file(exported):
    (comparison,) = exported.report.comparisons
    assert comparison.shape == (2, 64, 96)
    assert 0 < comparison.error < 1e-5
    assert comparison.agreement == 1.0
    assert exported.report.error == comparison.error / max(1.0, comparison.largest)


def test_a_wrong_file_is_refused(exported, reference):
    wrong = dataclasses.replace(reference, logits=reference.logits + np.float32(1e-2))
    with pytest.raises(UserError, match=r"relative error is 1\.0e-02, expected at most 1e-04"):
        compare(exported.path, exported.card, [wrong])
    compare(exported.path, exported.card, [wrong], Check(tolerance=0.1))


def test_no_number_is_no_agreement(exported, reference):
    broken = dataclasses.replace(reference, logits=np.full_like(reference.logits, np.nan))
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        compare(exported.path, exported.card, [broken])


def test_labels_that_are_not_those_of_the_logits_are_refused(exported, reference, tmp_path):
    model = onnx.load(exported.path)
    (node,) = [node for node in model.graph.node if node.op_type == "ArgMax"]
    node.op_type = "ArgMin"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="labels are not those of its logits"):
        compare(tmp_path / "m.onnx", exported.card, [reference])


def test_a_file_that_fails_is_not_left_behind(tmp_path):
    (tmp_path / "m.onnx").write_text("the file that was here before")
    options = ExportOptions(size=(32, 32), batch=1)
    model = source_model(tiny_segmentor("SegformerHead"))
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export_model(model, options, tmp_path / "m.onnx", check=Check(tolerance=1e-12))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the file that was here before"]


def test_free_sizes_are_tried_at_several(tmp_path):
    found = make_references(tiny_segmentor(), ExportOptions(batch=3))
    assert [reference.input.shape for reference in found] == [(3, 32, 32, 3), (3, 64, 128, 3), (3, 192, 160, 3)]
    assert [reference.logits.shape[2:] for reference in found] == [(8, 8), (16, 32), (48, 40)]

# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import onnx
import pytest

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.export import export
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.verify import Check, compare, references
from support.small_models import facts, tiny_segmentor

OPTIONS = ExportOptions(size=(32, 64), batch=2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tiny_segmentor(), OPTIONS, facts(5), tmp_path_factory.mktemp("verify") / "m.onnx")


def test_report_of_a_right_file(exported):
    (comparison,) = exported.report.comparisons
    assert comparison.shape == (2, 32, 64)
    assert 0 < comparison.error < 1e-5
    assert comparison.agreement == 1.0
    assert exported.report.error == comparison.error / max(1.0, comparison.largest)


def test_a_wrong_file_is_refused(exported):
    (reference,) = references(tiny_segmentor(), OPTIONS)
    wrong = dataclasses.replace(reference, logits=reference.logits + np.float32(1e-2))
    with pytest.raises(UserError, match=r"relative error 1\.0e-02, expected at most 1e-04"):
        compare(exported.path, exported.card, [wrong])
    compare(exported.path, exported.card, [wrong], Check(tolerance=0.1))


def test_no_number_is_no_agreement(exported):
    (reference,) = references(tiny_segmentor(), OPTIONS)
    broken = dataclasses.replace(reference, logits=np.full_like(reference.logits, np.nan))
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        compare(exported.path, exported.card, [broken])


def test_labels_that_are_not_those_of_the_logits_are_refused(tmp_path):
    exported = export(tiny_segmentor(), OPTIONS, facts(5), tmp_path / "m.onnx", check=None)
    model = onnx.load(exported.path)
    (node,) = [node for node in model.graph.node if node.op_type == "ArgMax"]
    node.op_type = "ArgMin"
    onnx.save(model, exported.path)
    with pytest.raises(UserError, match="labels are not those of its logits"):
        compare(exported.path, exported.card, references(tiny_segmentor(), OPTIONS))


def test_a_file_that_fails_is_not_left_behind(tmp_path):
    (tmp_path / "m.onnx").write_text("the file that was here before")
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export(tiny_segmentor(), OPTIONS, facts(5), tmp_path / "m.onnx", check=Check(tolerance=1e-12))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the file that was here before"]


def test_free_sizes_are_tried_at_several(tmp_path):
    found = references(tiny_segmentor(), ExportOptions(batch=3))
    assert [reference.input.shape for reference in found] == [(3, 32, 32, 3), (3, 64, 128, 3), (3, 192, 160, 3)]
    assert [reference.logits.shape[2:] for reference in found] == [(8, 8), (16, 32), (48, 40)]

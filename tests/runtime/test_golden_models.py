# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to labels: golden networks exported, then segmented as mmsegmentation does (tests/data)."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy import Segmenter
from internimage_deploy.card import METADATA_KEY, ModelCard, TensorSpec
from internimage_deploy.cli import main as cli
from internimage_deploy.cli.info import collect
from internimage_deploy.window import Window
from support import golden


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export a golden network once per set of options; returns the ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}

    def export(name, *options):
        if (name, *options) not in made:
            checkpoint = golden.checkpoint(name, folder / f"{name}.pth")
            target = folder / f"{name}{len(made)}.onnx"
            arguments = ["export-onnx", "--ckpt", checkpoint, "-o", target, "--no-verify", *options]
            with pytest.raises(SystemExit) as exit_:
                cli.run(cli.group, [str(argument) for argument in arguments])
            assert not exit_.value.code
            made[(name, *options)] = target
        return made[(name, *options)]

    return export


# How each pipeline's network is exported. The fixed one is run with a window of its own size, which takes the picture
# through the same steps as a network of free size; tracing a free UperNet takes long.
EXPORTS = {"pipeline_landscape": ("--size", "128x224"), "pipeline_portrait": ("--dynamic",)}


@pytest.fixture(params=golden.PIPELINES)
def pipeline(request, export):
    """(facts, arrays, RGB picture, segmenter) of a golden pipeline."""
    facts, arrays, image = read(request.param)
    model = export(facts["model"], "--emit", "logits", *EXPORTS[request.param])
    window = None if "--dynamic" in EXPORTS[request.param] else "slide"
    return facts, arrays, image, Segmenter.load(model, resize=tuple(facts["resize_scale"]), window=window, batch=3)


def read(name):
    arrays = golden.arrays(name)
    return golden.case(name), arrays, np.ascontiguousarray(arrays["image_bgr"][:, :, ::-1])


def test_labels_at_the_pictures_size(pipeline):
    facts, arrays, image, segmenter = pipeline
    clear = arrays["margin"] > 1e-3
    assert clear.mean() > 0.9
    result = segmenter(image)
    np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])
    assert result.classes == golden.meta(facts["model"])["CLASSES"]
    assert [list(color) for color in result.palette] == golden.meta(facts["model"])["PALETTE"]


def test_a_batch_of_mixed_sizes_changes_nothing(pipeline):
    _, arrays, image, segmenter = pipeline
    mixed = [image, np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(image[:40]), image]
    clear = arrays["margin"] > 1e-3
    results = segmenter(mixed)
    for result in (results[0], results[3]):
        np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])


def test_logits_of_the_network(pipeline):
    _, arrays, image, segmenter = pipeline
    (logits,) = segmenter.forward([segmenter.prepare(image)])
    assert np.abs(logits.reshape(arrays["logits"].shape) - arrays["logits"]).max() < 1e-4


@pytest.fixture
def portrait(export):
    """As `pipeline`, of the network of free size, with its file."""
    facts, arrays, image = read("pipeline_portrait")
    return facts, arrays, image, export(facts["model"], "--emit", "logits", "--dynamic")


def test_a_model_that_answers_labels(portrait, tmp_path):
    """Its labels are decided at network size: equal there; at the picture's size only borders move."""
    facts, arrays, image, model = portrait
    segmenter = Segmenter.load(with_labels(model, tmp_path / "m.onnx"), resize=tuple(facts["resize_scale"]))
    (labels,) = segmenter.forward([segmenter.prepare(image)])
    assert (labels != arrays["labels_network_size"]).mean() < 1e-3
    assert (segmenter(image).labels == arrays["labels_original_size"]).mean() > 0.9


def test_a_window_over_the_whole_picture_is_whole_inference(portrait):
    facts, arrays, image, model = portrait
    window = Window((256, 256), (128, 128))
    result = Segmenter.load(model, resize=tuple(facts["resize_scale"]), window=window)(image)
    clear = arrays["margin"] > 1e-3
    np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])


def test_info_counts_every_size(portrait):
    """Nothing in a SegFormer but grows with the area; sizes that the graph computes are followed."""
    facts, _, _, model = portrait
    totals = [collect(model, size)["multiply_adds"]["total"] for size in ((128, 128), (128, 256), (256, 256))]
    assert totals[0] > 0
    assert totals[1] == pytest.approx(2 * totals[0], rel=0.1)
    assert totals[2] == pytest.approx(2 * totals[1], rel=0.1)
    dcnv3 = collect(model)["graph"]["operators"]["internimage::DCNv3"]
    assert dcnv3 == sum(golden.case(facts["model"])["backbone"]["depths"])


def test_verify_of_real_models(portrait, tmp_path, capsys):
    *_, model = portrait
    labels = with_labels(model, tmp_path / "m.onnx")
    with pytest.raises(SystemExit) as exit_:
        cli.run(cli.group, ["verify", str(model), "--against", str(labels)])
    said = capsys.readouterr().out
    assert not exit_.value.code, said
    assert "follows the ONNX rules" in said
    assert said.count("% of the labels agree") == 3


def with_labels(source, target):
    """A copy of a logits model that answers labels: grown four times, then the highest class."""
    model = onnx.load(source)
    card = ModelCard.from_json(model.metadata_props[0].value)
    labels = TensorSpec("labels", "uint8", ("batch", "height", "width"))
    card = dataclasses.replace(card, output=labels)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "four_times"))
    model.graph.node.extend(
        [
            helper.make_node("Resize", ["logits", "", "four_times"], ["grown"], mode="linear"),
            helper.make_node("ArgMax", ["grown"], ["highest"], axis=1, keepdims=0),
            helper.make_node("Cast", ["highest"], ["labels"], to=TensorProto.UINT8),
        ]
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("labels", TensorProto.UINT8, labels.shape))
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, target)
    return target

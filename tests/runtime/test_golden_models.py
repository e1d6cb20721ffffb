# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to labels: golden networks exported, then segmented as mmsegmentation does (tests/data)."""

import numpy as np
import pytest

import golden
from internimage_deploy import Segmenter, cli
from internimage_deploy.runtime.backends.base import load_backend
from internimage_deploy.runtime.commands.info import collect


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


@pytest.fixture(params=golden.PIPELINES)
def pipeline(request):
    """(facts, arrays, RGB picture) of a golden pipeline."""
    arrays = golden.arrays(request.param)
    return golden.case(request.param), arrays, np.ascontiguousarray(arrays["image_bgr"][:, :, ::-1])


def load(model, facts, **options):
    return Segmenter.load(model, resize=tuple(facts["resize_scale"]), **options)


def test_labels_at_the_pictures_size(export, pipeline):
    facts, arrays, image = pipeline
    model = export(facts["model"], "--dynamic", "--emit", "logits")
    clear = arrays["margin"] > 1e-3
    assert clear.mean() > 0.9
    result = load(model, facts)(image)
    np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])
    assert result.classes == golden.meta(facts["model"])["CLASSES"]
    assert [list(color) for color in result.palette] == golden.meta(facts["model"])["PALETTE"]


def test_a_batch_of_mixed_sizes_changes_nothing(export, pipeline):
    facts, arrays, image = pipeline
    segmenter = load(export(facts["model"], "--dynamic", "--emit", "logits"), facts, batch=3)
    mixed = [image, np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(image[:40]), image]
    clear = arrays["margin"] > 1e-3
    for result in (segmenter(mixed)[0], segmenter(mixed)[3]):
        np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])


def test_logits_of_the_network(export, pipeline):
    facts, arrays, image = pipeline
    backend = load_backend(export(facts["model"], "--dynamic", "--emit", "logits"))
    segmenter = Segmenter(backend, resize=tuple(facts["resize_scale"]))
    (logits,) = segmenter.forward([segmenter.prepare(image)])
    assert np.abs(logits - arrays["logits"][0]).max() < 1e-4


def test_a_model_that_answers_labels(export):
    """Its labels are decided at network size: equal there; at the picture's size only borders move."""
    facts, arrays = golden.case("pipeline_portrait"), golden.arrays("pipeline_portrait")
    image = np.ascontiguousarray(arrays["image_bgr"][:, :, ::-1])
    segmenter = load(export(facts["model"], "--dynamic", "--emit", "labels"), facts)
    (labels,) = segmenter.forward([segmenter.prepare(image)])
    assert (labels != arrays["labels_network_size"]).mean() < 1e-3
    assert (segmenter(image).labels == arrays["labels_original_size"]).mean() > 0.9


def test_a_window_over_the_whole_picture_is_whole_inference(export, pipeline):
    from internimage_deploy.runtime.sliding import Window

    facts, arrays, image = pipeline
    model = export(facts["model"], "--dynamic", "--emit", "logits")
    result = load(model, facts, window=Window((256, 256), (128, 128)))(image)
    clear = arrays["margin"] > 1e-3
    np.testing.assert_array_equal(result.labels[clear], arrays["labels_original_size"][clear])


def test_info_counts_every_size(export):
    """All but the pooled pyramid grows with the area, at any size, shapes computed in the graph included."""
    model = export("upernet_t_like", "--dynamic", "--emit", "logits")
    totals = [collect(model, size)["multiply_adds"]["total"] for size in ((128, 128), (128, 256), (256, 256))]
    assert totals[0] > 0
    assert totals[1] == pytest.approx(2 * totals[0], rel=0.2)
    assert totals[2] == pytest.approx(2 * totals[1], rel=0.2)
    facts = collect(model)
    dcnv3 = facts["graph"]["operators"]["internimage::DCNv3"]
    assert dcnv3 == sum(golden.case("upernet_t_like")["backbone"]["depths"])


def test_verify_of_real_models(export, capsys):
    logits = export("segformer_l_like", "--dynamic", "--emit", "logits")
    labels = export("segformer_l_like", "--dynamic", "--emit", "labels")
    with pytest.raises(SystemExit) as exit_:
        cli.run(cli.group, ["verify", str(logits), "--against", str(labels)])
    said = capsys.readouterr().out
    assert not exit_.value.code, said
    assert "follows the ONNX rules" in said
    assert said.count("% of the labels agree") == 3

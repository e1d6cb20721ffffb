# SPDX-License-Identifier: Apache-2.0
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "toy_street"
CHECKPOINT = FOLDER / "toy_street_mask2former.pth"
sys.path.insert(0, str(FOLDER))

import mask_loss  # noqa: E402 (the example's folder is not a package)
import recipe  # noqa: E402
import scenes  # noqa: E402
import start  # noqa: E402

from internimage_deploy import evaluate  # noqa: E402
from internimage_deploy.exporter.checkpoint import read_checkpoint  # noqa: E402
from internimage_deploy.exporter.export import export  # noqa: E402
from internimage_deploy.onnx_tools.graph import Graph, save  # noqa: E402
from internimage_deploy.runtime.engine.precision import convert  # noqa: E402
from internimage_deploy.runtime.segmenter import Segmenter  # noqa: E402


def test_checkpoint_is_small_and_holds_plain_data_only():
    assert CHECKPOINT.stat().st_size <= 4_000_000
    content = torch.load(CHECKPOINT, weights_only=True)
    assert set(content) == {"meta", "state_dict"}
    assert content["meta"]["CLASSES"] == scenes.CLASSES


def test_everything_about_the_model_is_inferred_from_the_checkpoint():
    read = read_checkpoint(CHECKPOINT)
    assert read.segmentor.config == recipe.MASK2FORMER
    assert read.classes == scenes.CLASSES
    assert read.palette == scenes.PALETTE
    assert read.resize == (scenes.SIZE[1], scenes.SIZE[0])
    assert not read.notes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export(CHECKPOINT, tmp_path_factory.mktemp("toy_street_mask2former") / "model.onnx").path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """24 scenes: the folder of their images and that of their label maps."""
    folder = tmp_path_factory.mktemp("held_out")
    subprocess.run([sys.executable, str(FOLDER / "scenes.py"), str(folder), "--count", "24"], check=True)
    return folder / "images", folder / "labels"


@pytest.fixture(scope="module")
def images(held_out):
    return sorted(held_out[0].iterdir())


def labels(path, images):
    with Segmenter.load(path, backend="onnxruntime") as segmenter:
        return np.stack([segmenter(image).labels for image in images])


def test_model_segments_scenes_it_has_not_seen(model, held_out):
    assert evaluate(model, *held_out).miou >= 0.80


def test_the_rewrites_and_the_free_size_change_no_label(model, images, tmp_path):
    fixed = export(CHECKPOINT, tmp_path / "fixed.onnx", size=scenes.SIZE, plain=True).path
    # A mask logit next to 0 may fall on either side of the decision where to attend, so not bit for bit.
    assert np.mean(labels(model, images) != labels(fixed, images)) <= 1e-5


def test_the_half_precision_graph_computes_the_labels_of_the_float32_one(model, images, held_out, tmp_path):
    graph = Graph(onnx.load(model), model.parent)
    convert(graph, "fp16")
    half = tmp_path / "half.onnx"
    save(graph, half)
    assert np.mean(labels(model, images) == labels(half, images)) >= 0.998
    assert abs(evaluate(half, *held_out).miou - evaluate(model, *held_out).miou) <= 0.003


def test_training_starts_from_the_backbone_of_the_other_model():
    trained = torch.load(FOLDER / "toy_street.pth", weights_only=True)["state_dict"]
    state = start.start("mask2former").state_dict()
    backbone = {name for name in trained if name.startswith("backbone.")}
    assert backbone == {name for name in state if name.startswith("backbone.")}
    assert all(torch.equal(state[name], trained[name]) for name in backbone)


def test_training_sees_the_queries_before_and_after_every_layer():
    model = start.start("mask2former")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        features = model.backbone(torch.randn(1, 3, 64, 96, generator=generator))
        each = list(model.decode_head.predict_each(features))
        classes, masks = model.decode_head.predict(features)
    assert len(each) == recipe.MASK2FORMER.head.decoder_layers + 1
    assert torch.equal(each[-1][0], classes)
    assert torch.equal(each[-1][1], masks)
    assert all(not torch.equal(before[1], after[1]) for before, after in itertools.pairwise(each))


def test_cross_entropy_and_dice_of_a_worked_example():
    # One query, two cells: probabilities 3/4 and 1/2. Segment a covers the first cell, segment b a half of the second.
    masks = torch.tensor([[[3.0, 1.0]]]).log()
    cross_entropy, dice = mask_loss.pairwise(masks, torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]))
    log = np.log
    expected = [(-log(3 / 4) - log(1 / 2)) / 2, (-log(1 / 4) - log(1 / 2)) / 2]
    np.testing.assert_allclose(cross_entropy.flatten(), expected, rtol=1e-6)
    np.testing.assert_allclose(dice.flatten(), [1 - (1.5 + 1) / (2.25 + 1), 1 - (0.5 + 1) / (1.75 + 1)], rtol=1e-6)


def test_matching_is_the_cheapest_of_all():
    pytest.importorskip("scipy", reason="SciPy is what the training matches with")
    cost = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[True, False, True, True], [True, True, True, True], [False, False, False, True]])
    image, query, segment = mask_loss.match(cost, present)
    for index in range(3):
        here = present[index].nonzero()[:, 0].tolist()
        chosen = image == index
        assert sorted(segment[chosen].tolist()) == here
        total = cost[index, query[chosen], segment[chosen]].sum()
        every = itertools.permutations(range(5), len(here))
        cheapest = min(sum(float(cost[index, q, k]) for q, k in zip(order, here, strict=True)) for order in every)
        assert float(total) == pytest.approx(cheapest, abs=1e-6)


def test_loss_reaches_every_weight_and_falls_along_the_gradient():
    pytest.importorskip("scipy", reason="SciPy is what the training matches with")
    torch.manual_seed(0)
    model = start.start("mask2former")
    made = scenes.scene(1)
    x = torch.from_numpy(made.image[None]).permute(0, 3, 1, 2).float() / 64 - 2
    truth = torch.from_numpy(made.labels[None]).long()
    loss = mask_loss.mask_loss(model, x, truth)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    squares = sum(float(parameter.grad.square().sum()) for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-2 * loss.detach() / squares * parameter.grad
        assert mask_loss.mask_loss(model, x, truth) < loss

# SPDX-License-Identifier: Apache-2.0
"""The model card's file format."""

import dataclasses
import json

import pytest

from internimage_deploy.card import EngineInfo, ModelCard, TensorSpec
from internimage_deploy.errors import UserError

CARD = ModelCard(
    architecture="upernet_internimage",
    classes=("road", "sky"),
    palette=((128, 64, 128), (70, 130, 180)),
    input=TensorSpec("image", "uint8", ("batch", "height", "width", 3)),
    output=TensorSpec("labels", "uint8", ("batch", "height", "width")),
    resize=(2048, 512),
    kept_fp32=("Softmax",),
    rewrites=("layer-scale",),
    model={"head": {"num_classes": 2}},
    source={"random": "0"},
    tools={"torch": "2.13.0"},
)
ENGINE = EngineInfo(
    "tensorrt", "10.14.1", "ab", ("8.7",), ({"min": (1, 32, 32), "opt": (1, 64, 64), "max": (4, 96, 96)},), "1"
)


@pytest.mark.parametrize("card", [CARD, dataclasses.replace(CARD, resize=None, engine=ENGINE)], ids=["onnx", "engine"])
def test_a_card_survives_its_file(card):
    assert ModelCard.from_json(card.to_json()) == card


def test_the_files_keys_stay():
    keys = "architecture classes color_order engine input kept_fp32 mean model output palette precision resize rewrites"
    assert sorted(json.loads(CARD.to_json())) == [*keys.split(), "size_divisor", "source", "std", "tools", "version"]


def changed(**fields):
    return json.dumps(json.loads(CARD.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a model card"),
        ("[]", "not a model card"),
        ("nonsense", "not a model card"),
        (changed(version=2), "card version 2, this program reads version 1"),
        (changed(color_order="bgr"), "broken model card .*color_order: expected 'rgb'"),
        (changed(palette=[[0, 0, 0]]), "broken model card .*2 classes but 1 colours"),
        (changed(resize=[1, 2, 3]), "broken model card"),
        (changed(input={"name": "image"}), "broken model card"),
        (changed(surprise=1), "broken model card .*surprise"),
    ],
    ids=["empty", "list", "text", "version", "color order", "palette", "resize", "input", "unknown key"],
)
def test_a_card_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(UserError, match=f"m.onnx: {message}"):
        ModelCard.from_json(text, "m.onnx")

# SPDX-License-Identifier: Apache-2.0
"""The model card's file format."""

import dataclasses
import json

import pytest

from internimage_deploy.card import EngineInfo, ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.window import Window

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


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        dataclasses.replace(CARD, resize=None, engine=ENGINE),
        dataclasses.replace(CARD, window=Window((1024, 960), (512, 1))),
    ],
    ids=["onnx", "engine", "window"],
)
def test_a_card_survives_its_file(card):
    assert ModelCard.from_json(card.to_json()) == card


def test_the_files_keys_stay():
    keys = "architecture classes color_order engine input kept_fp32 mean model output palette precision resize rewrites"
    assert sorted(json.loads(CARD.to_json())) == [
        *keys.split(),
        "size_divisor",
        "source",
        "std",
        "tools",
        "version",
        "window",
    ]
    window = dataclasses.replace(CARD, window=Window((1024, 960), (512, 480))).to_json()
    assert json.loads(window)["window"] == {"crop": [1024, 960], "stride": [512, 480]}


def test_a_card_of_before_there_were_windows_is_read():
    fields = json.loads(CARD.to_json())
    del fields["window"]
    assert ModelCard.from_json(json.dumps(fields)) == CARD


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
        (changed(window=[64, 64]), "broken model card .*window: got .*expected an object"),
        (changed(window={"crop": [64, 64]}), "broken model card .*window: 'stride' is missing"),
        (changed(window={"crop": [64, 64], "stride": [65, 64]}), "broken model card .*expected strides from 1 to the"),
        (changed(window={"crop": [64, 64], "stride": [0, 64]}), "broken model card .*stride: got 0"),
        (changed(window={"crop": [64, True], "stride": [32, 32]}), "broken model card .*crop: got True"),
        (
            changed(window={"crop": [60, 64], "stride": [32, 32]}),
            r"broken model card .*crops of \(60, 64\), expected multiples of 32",
        ),
        (changed(surprise=1), "broken model card .*surprise"),
    ],
    ids=[
        "empty",
        "list",
        "text",
        "version",
        "color order",
        "palette",
        "resize",
        "input",
        *[f"window {i}" for i in range(6)],
        "unknown key",
    ],
)
def test_a_card_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(UserError, match=f"m.onnx: {message}"):
        ModelCard.from_json(text, "m.onnx")

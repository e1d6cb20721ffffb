# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "toy_street"
sys.path.insert(0, str(FOLDER))

import scenes  # noqa: E402 (the example's folder is not a package)


@pytest.fixture(scope="module")
def sample():
    return [scenes.scene(seed) for seed in range(scenes.FIRST_HELD_OUT, scenes.FIRST_HELD_OUT + 12)]


def test_a_seed_gives_the_same_scene_every_time(sample):
    again = scenes.scene(scenes.FIRST_HELD_OUT)
    assert np.array_equal(again.image, sample[0].image)
    assert np.array_equal(again.labels, sample[0].labels)
    assert not np.array_equal(sample[0].image, sample[1].image)


@pytest.mark.parametrize("size", [scenes.SIZE, (96, 160)], ids=["default size", "other size"])
def test_image_and_labels_have_the_size_asked_for(size):
    made = scenes.scene(3, size)
    assert made.image.shape == (*size, 3)
    assert made.image.dtype == np.uint8
    assert made.labels.shape == size
    assert made.labels.dtype == np.uint8


def test_every_class_occurs_and_none_rules(sample):
    labels = np.concatenate([made.labels.ravel() for made in sample])
    share = np.bincount(labels, minlength=len(scenes.CLASSES)) / labels.size
    assert len(share) == len(scenes.CLASSES) == len(scenes.PALETTE)
    assert share.min() > 0.003
    assert share.max() < 0.5


def test_labels_follow_the_picture(sample):
    # Colour edges must be commoner on label borders than inside a region: labels shifted against the image fail this.
    on_border, inside = [], []
    for made in sample:
        grey = made.image.mean(axis=2)
        step = np.abs(np.diff(grey, axis=1))
        border = np.diff(made.labels.astype(int), axis=1) != 0
        on_border.append(step[border].mean())
        inside.append(step[~border].mean())
    assert np.mean(on_border) > 3 * np.mean(inside)


def test_colour_alone_does_not_give_the_class(sample):
    # The best a lookup from colour (16 levels a channel, learnt on these very scenes) can do stays far from the truth.
    colours = np.concatenate([made.image.reshape(-1, 3) for made in sample]).astype(int) // 16
    labels = np.concatenate([made.labels.ravel() for made in sample])
    counts = np.zeros((4096, len(scenes.CLASSES)))
    np.add.at(counts, (colours @ (256, 16, 1), labels), 1)
    assert counts.max(axis=1).sum() / labels.size < 0.75

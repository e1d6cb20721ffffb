# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internimage_deploy.runtime.imaging.postprocess import labels_from_labels, labels_from_logits
from internimage_deploy.runtime.imaging.preprocess import Geometry, fixed_geometry, free_geometry, keep_ratio_size


def reference(logits, geometry):
    """Every class at full size with OpenCV's bilinear resizing, and the pixels where two classes are not near a tie."""
    height, width = geometry.network
    rows, columns = geometry.content
    planes = [cv2.resize(plane, (width, height))[:rows, :columns] for plane in logits]
    full = np.stack([cv2.resize(np.ascontiguousarray(plane), geometry.image[::-1]) for plane in planes])
    ordered = np.sort(full, axis=0)
    return full.argmax(axis=0), ordered[-1] - ordered[-2] > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    image=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    network=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    classes=st.integers(2, 30),
    smooth=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_tiles_equal_full_planes(image, network, classes, smooth, seed):
    rng = np.random.default_rng(seed)
    network = (network[0] * 32, network[1] * 32)
    geometry = fixed_geometry(image, network) if seed % 2 else Geometry(image, network, network, network)
    size = (network[0] // 4, network[1] // 4)
    if smooth:
        coarse = rng.standard_normal((classes, 3, 3)).astype(np.float32)
        logits = np.stack([cv2.resize(plane, size[::-1], interpolation=cv2.INTER_CUBIC) for plane in coarse])
    else:
        logits = rng.standard_normal((classes, *size)).astype(np.float32)
    expected, clear = reference(logits, geometry)
    labels = labels_from_logits(logits, geometry)
    assert labels.shape == image
    np.testing.assert_array_equal(labels[clear], expected[clear])


def test_half_precision_logits_are_read():
    logits = np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float16)
    geometry = Geometry((32, 32), (32, 32), (32, 32), (32, 32))
    np.testing.assert_array_equal(
        labels_from_logits(logits, geometry), labels_from_logits(logits.astype(np.float32), geometry)
    )


def test_equal_scores_give_the_first_class():
    geometry = Geometry((32, 32), (32, 32), (32, 32), (32, 32))
    assert not labels_from_logits(np.ones((5, 8, 8), np.float32), geometry).any()


def test_labels_grow_to_the_nearest_pixel_centre():
    labels = np.array([[0, 1], [2, 3]], np.uint8)
    geometry = Geometry((4, 6), (2, 2), (2, 2), (2, 2))
    expected = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3], [2, 2, 2, 3, 3, 3]]
    np.testing.assert_array_equal(labels_from_labels(labels, geometry, 4), expected)
    padded = np.pad(labels, ((0, 3), (0, 5)), constant_values=9)
    np.testing.assert_array_equal(labels_from_labels(padded, geometry, 4), expected)


# mmcv's imrescale: the smaller of the two factors, sides rounded half up.
@pytest.mark.parametrize(
    ("image", "limit", "expected"),
    [
        ((480, 640), (2048, 512), (512, 683)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((300, 4000), (2048, 512), (154, 2048)),
        ((10, 20000), (2048, 512), (1, 2048)),
        ((1, 1), (2048, 512), (512, 512)),
    ],
)
def test_keep_ratio_size(image, limit, expected):
    assert keep_ratio_size(image, limit) == expected
    assert keep_ratio_size(image[::-1], limit) == expected[::-1]


def test_geometry_of_free_and_fixed_networks():
    assert free_geometry((480, 640), (2048, 512), 32).network == (512, 704)
    assert free_geometry((75, 113), None, 32).network == (96, 128)
    wide = fixed_geometry((100, 400), (512, 512))
    assert (wide.content, wide.network) == ((128, 512), (512, 512))
    assert fixed_geometry((1, 5000), (64, 64)).content == (1, 64)

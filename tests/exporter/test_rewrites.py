# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internimage_deploy.errors import UserError
from internimage_deploy.exporter import rewrites
from internimage_deploy.exporter.models import HeadConfig, SegmentorConfig, build_random
from internimage_deploy.exporter.network import Network
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites import resampling
from support import golden
from support.small_models import FAMILIES, MASK2FORMER_REWRITES, golden_segmentor, run, session, small

SIZES = [(1, 32, 32), (2, 96, 64), (1, 160, 32)]


def rewritten(segmentor, names=None):
    changed = copy.deepcopy(segmentor)
    without = tuple(name for name in rewrites.REWRITES if names is not None and name not in names)
    applied = rewrites.apply(changed, ExportOptions(size=(32, 32), input="float", without=without))
    return changed, applied


def error_in_range(got, expected):
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


def random_image(batch, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * width + batch)
    return torch.randn(batch, 3, height, width, generator=generator).to(dtype)


def heads_of(name):
    return "SegformerHead" if name == "segformer-fusion" else "UPerHead"


# Families that have what a rewrite changes; all, where it is not named.
HAS = {"layer-scale": ("t", "l"), "offset-scale": ("l",)}


@pytest.mark.parametrize("name", [name for name in rewrites.REWRITES if name not in MASK2FORMER_REWRITES])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rewrite_alone_applies_and_keeps_the_output(name, family):
    others = tuple(other for other in rewrites.REWRITES if other != name)
    options = ExportOptions(size=(64, 96), emit="logits", without=others)
    plain = small(family, heads_of(name))
    changed = copy.deepcopy(plain)
    assert rewrites.apply(changed, options) == ((name,) if family in HAS.get(name, FAMILIES) else ())
    image = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, output = Network(plain, options)(image), Network(changed, options)(image)
    assert error_in_range(output, expected) <= 1e-5


@pytest.mark.parametrize("head", ["UPerHead", "SegformerHead"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_all_rewrites_together_keep_the_output(family, head, size):
    plain = small(family, head)
    changed, _ = rewritten(plain)
    x = random_image(*size)
    with torch.inference_mode():
        assert error_in_range(changed(x), plain(x)) <= 1e-5


@pytest.mark.parametrize("head", ["UPerHead", "SegformerHead"])
def test_rewrites_are_identities_not_approximations(head):
    # In float64 an identity leaves rounding of 1e-16 alone, and an approximation shows.
    plain = small("l", head).double()
    changed, _ = rewritten(plain)
    x = random_image(2, 64, 96, torch.float64)
    with torch.inference_mode():
        assert error_in_range(changed(x), plain(x)) <= 1e-12


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_rewritten_networks_equal_the_official_ones(name):
    changed, applied = rewritten(golden_segmentor(name))
    assert applied
    with torch.inference_mode():
        logits = changed(torch.from_numpy(golden.network_input(name)))
    expected = torch.from_numpy(golden.arrays(name)["logits"])
    assert error_in_range(logits, expected) <= 1e-5


@pytest.mark.parametrize("head", ["UPerHead", "SegformerHead"])
@pytest.mark.parametrize("family", ["t", "l"])
def test_half_precision_is_no_worse_than_the_plain_network(head, family):
    # Summed over seeds, because the error of one small network is a matter of luck.
    errors = {"plain": 0.0, "rewritten": 0.0}
    for seed in range(4):
        plain = small(family, head, seed=seed)
        changed, _ = rewritten(plain)
        x = random_image(1, 64, 64)
        with torch.inference_mode():
            expected = plain(x)
            for kind, network in (("plain", plain), ("rewritten", changed)):
                output = copy.deepcopy(network).half()(x.half()).float()
                errors[kind] += float((output - expected).square().mean().sqrt())
    assert errors["rewritten"] <= 1.2 * errors["plain"]


def test_standard_deviation_in_the_stem_keeps_the_border():
    # An image that is far from the mean at its border, where padding with black instead of the mean would show.
    options = ExportOptions(size=(64, 96), emit="logits")
    plain = small("t")
    changed = copy.deepcopy(plain)
    assert "stem-normalisation" in rewrites.apply(changed, options)
    image = torch.full((2, 64, 96, 3), 255, dtype=torch.uint8)
    image[:, 8:-8, 8:-8] = torch.randint(0, 256, (48, 80, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, output = Network(plain, options)(image), Network(changed, options)(image)
    assert error_in_range(output, expected) <= 1e-5


def test_batch_norms_of_a_backbone_fold_too():
    config = dataclasses.replace(FAMILIES["t"], norm_layer="BN")
    plain = build_random(SegmentorConfig(config, HeadConfig("UPerHead", 32, 7)))
    changed, _ = rewritten(plain, ["batch-norm"])
    assert not [module for module in changed.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.inference_mode():
        x = random_image(2, 64, 96)
        assert error_in_range(changed(x), plain(x)) <= 1e-5


def test_the_original_and_its_tensors_stay_as_they_are():
    plain = small("l")
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    shared = copy.copy(plain)
    changed, _ = rewritten(plain)
    assert changed.state_dict().keys() != before.keys()
    assert all(torch.equal(value, before[key]) for key, value in shared.state_dict().items())


def test_select_leaves_out_what_the_options_say():
    fixed, free = {"size": (64, 64)}, {"size": None}
    assert rewrites.select(ExportOptions(**fixed)) == tuple(rewrites.REWRITES)
    assert rewrites.select(ExportOptions(**fixed, plain=True)) == ()
    assert rewrites.select(ExportOptions(**free, plain=True)) == ("adaptive-pooling",)
    assert "upernet-fusion" not in rewrites.select(ExportOptions(**free, without=("upernet-fusion",)))
    with pytest.raises(UserError, match=r"no rewrite is called 'magic'; expected one of .*upernet-fusion"):
        rewrites.select(ExportOptions(without=("magic",)))
    with pytest.raises(UserError, match=r"a graph of free size is wrong without .* fix the size"):
        rewrites.select(ExportOptions(**free, without=("adaptive-pooling",)))


@pytest.mark.parametrize("source", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("target", [1, 3, 16, 40, 128])
def test_resampling_matrices_equal_pytorch(source, target):
    x = torch.randn(1, 1, source, dtype=torch.float64)
    expected = F.interpolate(x, size=target, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(resampling.interpolation(source, target, x) @ x[0, 0], expected)
    expected = F.adaptive_avg_pool1d(x, target)[0, 0]
    torch.testing.assert_close(resampling.adaptive_average(source, target, x) @ x[0, 0], expected)


def test_shifted_interpolation_by_hand():
    # Two pixels to four: weights 3/4 and 1/4; kernel points before the first row and after the last read zero padding.
    before, middle, after = resampling.shifted_interpolation(2, 4, torch.zeros(()))
    expected = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    torch.testing.assert_close(middle, expected)
    torch.testing.assert_close(before, torch.cat([torch.zeros(1, 2), expected[:3]]))
    torch.testing.assert_close(after, torch.cat([expected[1:], torch.zeros(1, 2)]))


def test_labels_are_those_of_the_plain_export(exports):
    image = np.random.default_rng(0).integers(0, 256, (2, 96, 160, 3), np.uint8)
    labels = {}
    for plain in (True, False):
        exported = exports("small_l", ExportOptions(size=(96, 160), batch=2, plain=plain))
        assert bool(exported.card.rewrites) == (not plain)
        labels[plain] = run(session(exported.path), image)
    assert len(np.unique(labels[True])) > 1
    assert (labels[True] != labels[False]).mean() <= 1e-4

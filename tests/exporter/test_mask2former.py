# SPDX-License-Identifier: Apache-2.0
"""Mask2Former in PyTorch: against the official implementation, its rewrites, and reading its checkpoints."""

import copy
import re

import numpy as np
import pytest
import torch

from internimage_deploy.errors import UserError
from internimage_deploy.exporter import mmconfig, rewrites
from internimage_deploy.exporter.checkpoint import read_checkpoint
from internimage_deploy.exporter.models import SegmentorConfig, build_random, ms_deform_attn
from internimage_deploy.exporter.models.mask2former import Decision, resize_to
from internimage_deploy.exporter.network import Network
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.presets import PRESETS
from internimage_deploy.exporter.rewrites.mask2former import middle_average
from internimage_deploy.window import Window
from support import golden
from support.small_models import FAMILIES, MASK2FORMER_REWRITES, golden_config, golden_segmentor, mask2former, small


@pytest.mark.parametrize("name", golden.MASK2FORMER)
def test_every_stage_equals_the_official_one(name):
    segmentor, expected = golden_segmentor(name), golden.arrays(name)
    head = segmentor.decode_head
    with torch.inference_mode():
        features = segmentor.backbone(torch.from_numpy(golden.network_input(name)))
        memories, levels, mask_features = head.pixel_decoder(features)
        classes, masks = head.predict(features)
        scores = head(features)
    got = {f"feature{i}": x for i, x in enumerate(features)} | {"class_logits": classes, "mask_logits": masks}
    got |= {"logits": scores, "mask_features": mask_features}
    for index, (memory, level) in enumerate(zip(memories, levels, strict=True)):
        got[f"memory{index}"] = memory.transpose(1, 2).unflatten(2, (level.height, level.width))
    for key, value in got.items():
        largest = np.abs(expected[key]).max()
        np.testing.assert_allclose(value.numpy(), expected[key], atol=1e-5 * max(1, largest), rtol=0, err_msg=key)


@pytest.mark.parametrize("name", golden.MASK2FORMER)
def test_attention_masks_are_the_official_ones_and_clear_full_rows(name):
    segmentor, expected, case = golden_segmentor(name), golden.arrays(name), golden.case(name)
    seen = []
    for module in segmentor.modules():
        if isinstance(module, Decision):
            module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.inference_mode():
        segmentor(torch.from_numpy(golden.network_input(name)))
    assert len(seen) == case["head"]["decoder_layers"]
    for layer, (logits, masked) in enumerate(seen):
        official = torch.from_numpy(expected[f"layer{layer}.mask_logits"])
        side = 32 >> layer % 3
        height, width = (size // side for size in case["input"][2:])
        negative = resize_to(official, height, width).sigmoid().flatten(2) < 0.5
        full = negative.all(-1)
        assert int(full.sum()) == case["fully_masked_rows"][layer]
        assert torch.equal(masked, negative & ~full[..., None])
        assert abs(float(logits.abs().min()) - case["attention_margin"][layer]) <= 1e-3 * float(logits.abs().max())


@pytest.mark.parametrize("name", sorted(golden.case("msda_op")))
def test_operator_equals_the_official_one(name):
    data = golden.arrays("msda_op")
    value, locations, weights = (
        torch.from_numpy(data[f"{name}.{part}"]) for part in ("value", "sampling_locations", "attention_weights")
    )
    sizes = [tuple(size) for size in data[f"{name}.spatial_shapes"].tolist()]
    output = ms_deform_attn(value, sizes, locations, weights)
    np.testing.assert_allclose(output.numpy(), data[f"{name}.output"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_average_of_the_middle_is_the_bilinear_resize(factor):
    x = torch.randn(2, 3, 3 * factor, factor, dtype=torch.float64)
    torch.testing.assert_close(middle_average(x, factor), resize_to(x, 3, 1))


def in_float64(segmentor, size):
    """The output for a random image: in float64 an identity leaves 1e-16, an approximation or a tie shows."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        return segmentor.double()(x)


@pytest.mark.parametrize("name", MASK2FORMER_REWRITES)
@pytest.mark.parametrize("levels", [3, 4])
def test_each_rewrite_is_an_identity(name, levels):
    plain = build_random(SegmentorConfig(FAMILIES["h"], mask2former(levels=levels))).double()
    changed = copy.deepcopy(plain)
    others = tuple(other for other in rewrites.REWRITES if other != name)
    applied = rewrites.apply(changed, ExportOptions(size=(64, 96), input="float", without=others))
    assert applied == (() if name == "fine-map" and levels == 4 else (name,))
    expected = in_float64(plain, (64, 96))
    assert float((in_float64(changed, (64, 96)) - expected).abs().max() / expected.max()) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (160, 64)])
def test_all_rewrites_together_are_identities(family, size):
    plain = small(family, "Mask2FormerHead").double()
    changed = copy.deepcopy(plain)
    applied = rewrites.apply(changed, ExportOptions(size=size, input="float"))
    assert set(MASK2FORMER_REWRITES) <= set(applied)
    expected = in_float64(plain, size)
    assert float((in_float64(changed, size) - expected).abs().max() / expected.max()) <= 1e-11


def test_rewrites_that_would_cost_more_are_not_applied():
    # A head narrower than the backbone's map, and one of few mask channels.
    segmentor = small("t", "Mask2FormerHead")
    narrow = build_random(SegmentorConfig(segmentor.config.backbone, mask2former(channels=16, norm_groups=4)))
    few = build_random(SegmentorConfig(segmentor.config.backbone, mask2former(mask_channels=4)))
    assert "fine-map" not in rewrites.apply(narrow, ExportOptions(size=(64, 64)))
    assert "mask-feature" not in rewrites.apply(few, ExportOptions(size=(64, 64)))


@pytest.mark.parametrize("classes", [7, 19])
def test_random_models_show_several_classes(classes):
    config = mask2former(num_classes=classes, queries=20)
    segmentor = build_random(SegmentorConfig(FAMILIES["h"], config))
    with torch.inference_mode():
        labels = segmentor(torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))).argmax(1)
    counts = labels.unique(return_counts=True)[1]
    assert len(counts) >= 3
    assert counts.max() < 0.97 * labels.numel()


@pytest.mark.parametrize("with_meta", [True, False], ids=["config", "no-config"])
@pytest.mark.parametrize("name", golden.MASK2FORMER)
def test_architecture_is_inferred(name, with_meta, tmp_path):
    path = golden.checkpoint(name, tmp_path / "model.pth", with_meta=with_meta)
    blocks = tuple(golden.case(name)["backbone"]["level2_post_norm_block_ids"])
    settings = {} if with_meta else {"offset_scale": 1.0, "post_norm_blocks": blocks}
    model = read_checkpoint(path, **settings)
    assert model.segmentor.config == golden_config(name)
    assert model.architecture == "mask2former_internimage"
    slides = with_meta and "test_cfg" in golden.case(name)
    assert model.window == (Window((64, 64), (32, 32)) if slides else None)
    assert any("attention heads" in note for note in model.notes) == (not with_meta)
    assert any("group norms" in note for note in model.notes) == (not with_meta)


def test_stated_heads_and_groups_win(tmp_path):
    path = golden.checkpoint("m2f_h_like", tmp_path / "model.pth")
    head = read_checkpoint(path, attention_heads=4, norm_groups=8).segmentor.config.head
    assert (head.encoder_heads, head.decoder_heads, head.points, head.norm_groups) == (4, 4, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decode_head.mask_embed.2.bias"), r"1 missing \('decode_head.mask_embed.2.bias'\)"),
        (lambda w: w.pop("decode_head.query_feat.weight"), r"has no tensor 'decode_head.query_feat.weight'"),
        (lambda w: w.pop("decode_head.transformer_decoder.layers.1.norms.0.weight"), r"layers.1.norms.0.weight"),
        (
            lambda w: w.update({"decode_head.decoder_input_projs.0.weight": torch.ones(1)}),
            r"1 unknown \('decode_head.decoder_input_projs.0.weight'\)",
        ),
        (
            lambda w: w.update({"decode_head.pixel_decoder.level_encoding.weight": torch.ones(2, 64)}),
            r"the pixel decoder has 2 levels; expected 3",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("decode_head.pixel_decoder.encoder.")],
            r"the pixel decoder has 0 encoder layers",
        ),
    ],
    ids=["missing", "no-queries", "missing-norm", "unknown", "two-levels", "no-encoder"],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(change, message, tmp_path):
    weights = {name: torch.from_numpy(value) for name, value in golden.state_dict("m2f_h_like").items()}
    change(weights)
    path = tmp_path / "model.pth"
    torch.save({"meta": golden.meta("m2f_h_like"), "state_dict": weights}, path)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backbone.layer1.0.conv1.weight", "is a Mask2Former checkpoint on a ResNet backbone"),
        (
            "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
            "is a Mask2Former checkpoint on a Swin Transformer backbone",
        ),
        ("backbone.something.weight", "is a Mask2Former checkpoint on another backbone"),
    ],
)
def test_other_backbones_are_refused_by_name(name, message, tmp_path):
    weights = {
        key: torch.from_numpy(value)
        for key, value in golden.state_dict("m2f_h_like").items()
        if key.startswith("decode_head.")
    }
    path = tmp_path / "model.pth"
    torch.save({"state_dict": weights | {name: torch.ones(1)}}, path)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("prefix", ["panoptic_head.pixel_decoder", "panoptic_fusion_head", "sem_seg_head.predictor"])
def test_panoptic_and_instance_checkpoints_are_refused_by_name(prefix, tmp_path):
    path = tmp_path / "model.pth"
    weights = {
        "backbone.levels.0.blocks.0.dcn.input_proj.weight": torch.ones(1, 1),
        f"{prefix}.x.weight": torch.ones(1),
    }
    torch.save({"state_dict": weights}, path)
    with pytest.raises(UserError, match="is a Mask2Former checkpoint for panoptic or instance segmentation"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("test_cfg=dict(mode='slide', crop_size=(1024, 1024), stride=(512, 512))", Window((1024, 1024), (512, 512))),
        ("test_cfg=dict(mode='slide', crop_size=[896, 512], stride=512)", Window((896, 512), (512, 512))),
        ("test_cfg=dict(mode='whole')", None),
    ],
)
def test_the_window_of_a_training_config(text, window):
    assert mmconfig.test_window(mmconfig.parse(f"model = dict({text})")) == window


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("crop_size=(0, 1), stride=(1, 1)", r"whole, for the sliding window .* has the crop \(0, 1\)"),
        ("crop_size=(64, 64)", "and the stride None"),
        ("crop_size=(64, 64), stride=(128, 64)", "strides from 1 to the crop's size"),
        ("crop_size=(520, 520), stride=(256, 256)", "crops of 520x520, .* are no multiples of 32"),
    ],
)
def test_a_window_that_cannot_be_is_left_out_and_said(window, message, tmp_path):
    weights = {name: torch.from_numpy(value) for name, value in golden.state_dict("m2f_h_like").items()}
    meta = golden.meta("m2f_h_like")
    meta["config"] = meta["config"].replace("mode='whole'", f"mode='slide', {window}")
    torch.save({"meta": meta, "state_dict": weights}, tmp_path / "model.pth")
    model = read_checkpoint(tmp_path / "model.pth")
    assert model.window is None
    assert any(re.search(message, note) for note in model.notes), model.notes


def test_released_models_have_the_published_number_of_parameters():
    # Published: 1.31 B and 1,094 M. Counted by hand: tests/data/README.md's source.
    from internimage_deploy.exporter.models import build_without_weights

    counts = {}
    for name in ("mask2former_internimage_h_896_80k_cocostuff2ade20k",
                 "mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes"):  # fmt: skip
        counts[name] = sum(p.numel() for p in build_without_weights(PRESETS[name].config).parameters())
    assert list(counts.values()) == [1_313_496_135, 1_093_867_908]
    assert len([name for name in PRESETS if name.startswith("mask2former")]) == 7


def test_labels_of_the_network_are_those_of_its_scores():
    segmentor = golden_segmentor("m2f_h_like")
    expected = golden.arrays("m2f_h_like")
    network = Network(segmentor, ExportOptions(size=(64, 96), input="float"))
    with torch.inference_mode():
        labels = network(torch.from_numpy(golden.network_input("m2f_h_like"))).numpy()
    clear = expected["margin"] > 1e-3
    np.testing.assert_array_equal(labels[clear], expected["labels_network_size"][clear])

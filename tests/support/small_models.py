# SPDX-License-Identifier: Apache-2.0
"""Small segmentors with every part of the released ones, and running them."""

import numpy as np
import onnxruntime as ort
import torch

from internimage_deploy.datasets.classes import generic
from internimage_deploy.exporter.models import (
    BackboneConfig,
    HeadConfig,
    Mask2FormerConfig,
    SegmentorConfig,
    build_random,
    build_with,
)
from internimage_deploy.exporter.source import SourceModel
from support import golden

_SMALL = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}

# One per family: what distinguishes them is where norms and scales stand.
FAMILIES = {
    "t": BackboneConfig(**_SMALL, layer_scale=True),
    "l": BackboneConfig(**_SMALL, layer_scale=True, post_norm=True, offset_scale=2.0),
    "h": BackboneConfig(
        **_SMALL,
        res_post_norm=True,
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(1,),
    ),
    "g": BackboneConfig(**_SMALL, post_norm=True, center_feature_scale=True, level2_post_norm_block_ids=(0, 1)),
}


def small(family="t", head="UPerHead", *, classes=7, seed=0):
    """A small segmentor of one family, with random weights under which everything matters."""
    config = mask2former(num_classes=classes) if head == "Mask2FormerHead" else HeadConfig(head, 32, classes)
    return build_random(SegmentorConfig(FAMILIES[family], config), seed)


# Tested in float64 (exporter/test_mask2former.py): in float32 a tie of an attention mask may look like an error.
MASK2FORMER_REWRITES = ("sampling-gemm", "mask-feature", "attention-masks", "first-query", "fine-map")


def mask2former(**settings):
    """A small Mask2Former: more channels than the backbone's first map, as the released wide head has."""
    defaults = {"channels": 64, "num_classes": 7, "queries": 10, "encoder_heads": 2, "decoder_heads": 4}
    defaults |= {"encoder_feedforward": 96, "decoder_feedforward": 80, "mask_channels": 48, "norm_groups": 16}
    return Mask2FormerConfig(**defaults | {"encoder_layers": 2, "decoder_layers": 4} | settings)


def tiny_segmentor(head="UPerHead", classes=5, **backbone):
    """One block per level: quick to trace."""
    settings = {"channels": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8)} | backbone
    return build_random(SegmentorConfig(BackboneConfig(**settings), HeadConfig(head, 16, classes)))


def golden_config(name):
    case = golden.case(name)
    backbone = dict(case["backbone"])
    ids = backbone.pop("level2_post_norm_block_ids", ())
    backbone.pop("level2_post_norm", None)
    backbone["layer_scale"] = backbone["layer_scale"] is not None
    for key in ("depths", "groups"):
        backbone[key] = tuple(backbone[key])
    return SegmentorConfig(
        BackboneConfig(**backbone, level2_post_norm_block_ids=tuple(ids)), _golden_head(case["head"])
    )


def _golden_head(head):
    if head["type"] != "Mask2FormerHead":
        return HeadConfig(head["type"], head["channels"], head["num_classes"])
    same = ("num_classes", "encoder_heads", "decoder_heads", "encoder_feedforward", "decoder_feedforward")
    return Mask2FormerConfig(
        **{name: head[name] for name in (*same, "encoder_layers", "decoder_layers", "norm_groups")},
        channels=head["feat_channels"],
        mask_channels=head["out_channels"],
        queries=head["num_queries"],
        levels=head["num_levels"],
        points=head["num_points"],
    )


def golden_segmentor(name):
    weights = {key: torch.from_numpy(value) for key, value in golden.state_dict(name).items()}
    return build_with(golden_config(name), weights)


def source_model(segmentor, name="tiny"):
    """The segmentor with numbered classes, as `export_model` takes it."""
    return SourceModel(segmentor, name, *generic(segmentor.config.head.num_classes))


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(opened, array):
    return opened.run(None, {opened.get_inputs()[0].name: array})[0]


def in_pytorch(segmentor, array):
    with torch.inference_mode():
        return segmentor(torch.from_numpy(array)).numpy()


def random_input(batch, height, width, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, height, width), np.float32)

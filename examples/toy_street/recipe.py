# SPDX-License-Identifier: Apache-2.0
"""The demo's model: its architecture, and its checkpoint in the form that mmsegmentation saves."""

from __future__ import annotations

from scenes import CLASSES, PALETTE, SIZE

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter.models import BackboneConfig, HeadConfig, Segmentor, SegmentorConfig

CONFIG = SegmentorConfig(
    BackboneConfig(channels=24, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), mlp_ratio=1.5, layer_scale=True),
    HeadConfig("UPerHead", channels=32, num_classes=len(CLASSES)),
)

# The training config as the official tools store it: it states what the weights do not show.
_META_CONFIG = f"""\
dataset_type = 'ToyStreet'
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='InternImage',
        core_op='DCNv3',
        channels={CONFIG.backbone.channels},
        depths={list(CONFIG.backbone.depths)},
        groups={list(CONFIG.backbone.groups)},
        mlp_ratio={CONFIG.backbone.mlp_ratio},
        act_layer='{CONFIG.backbone.act_layer}',
        norm_layer='{CONFIG.backbone.norm_layer}',
        layer_scale=1.0,
        offset_scale={CONFIG.backbone.offset_scale},
        post_norm={CONFIG.backbone.post_norm},
        out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        type='{CONFIG.head.type}',
        in_channels={[CONFIG.backbone.channels * 2**i for i in range(4)]},
        in_index=[0, 1, 2, 3],
        pool_scales={CONFIG.head.pool_scales},
        channels={CONFIG.head.channels},
        num_classes={CONFIG.head.num_classes},
        norm_cfg=dict(type='BN', requires_grad=True),
        align_corners=False),
    test_cfg=dict(mode='whole'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=({SIZE[1]}, {SIZE[0]}),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='ResizeToMultiple', size_divisor=32),
            dict(type='RandomFlip'),
            dict(type='Normalize', mean={list(IMAGENET_MEAN)}, std={list(IMAGENET_STD)}, to_rgb=True),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
"""


def checkpoint(model: Segmentor, steps: int) -> dict[str, dict[str, object]]:
    """The checkpoint as mmsegmentation saves it; plain values and tensors, so that it loads with `weights_only`."""
    meta: dict[str, object] = {
        "mmseg_version": "0.27.0",
        "config": _META_CONFIG,
        "CLASSES": CLASSES,
        "PALETTE": [list(colour) for colour in PALETTE],
        "epoch": 1,
        "iter": steps,
    }
    return {"meta": meta, "state_dict": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}}

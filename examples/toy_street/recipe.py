# SPDX-License-Identifier: Apache-2.0
"""The demo's models: their architectures, and their checkpoints in the form that mmsegmentation saves."""

from __future__ import annotations

from scenes import CLASSES, PALETTE, SIZE

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter.models import (
    BackboneConfig,
    HeadConfig,
    Mask2FormerConfig,
    Segmentor,
    SegmentorConfig,
)

_BACKBONE = BackboneConfig(channels=24, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), mlp_ratio=1.5, layer_scale=True)
UPERNET = SegmentorConfig(_BACKBONE, HeadConfig("UPerHead", channels=32, num_classes=len(CLASSES)))
MASK2FORMER = SegmentorConfig(
    _BACKBONE,
    Mask2FormerConfig(
        channels=64,
        num_classes=len(CLASSES),
        queries=24,
        encoder_heads=2,
        decoder_heads=2,
        encoder_feedforward=128,
        decoder_feedforward=256,
        mask_channels=64,
        encoder_layers=2,
        decoder_layers=3,
    ),
)

CONFIGS = {"upernet": UPERNET, "mask2former": MASK2FORMER}

_TEST_PIPELINE = f"""\
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


def training_config(config: SegmentorConfig) -> str:
    """The training config as the official tools store it: it states what the weights do not show."""
    backbone = config.backbone
    mask2former = isinstance(config.head, Mask2FormerConfig)
    return f"""\
dataset_type = 'ToyStreet'
model = dict(
    type='{"EncoderDecoderMask2Former" if mask2former else "EncoderDecoder"}',
    backbone=dict(
        type='InternImage',
        core_op='DCNv3',
        channels={backbone.channels},
        depths={list(backbone.depths)},
        groups={list(backbone.groups)},
        mlp_ratio={backbone.mlp_ratio},
        act_layer='{backbone.act_layer}',
        norm_layer='{backbone.norm_layer}',
        layer_scale=1.0,
        offset_scale={backbone.offset_scale},
        post_norm={backbone.post_norm},
        out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        type='{config.head.type}',
        in_channels={[backbone.channels * 2**i for i in range(4)]},
{_mask2former(config.head) if isinstance(config.head, Mask2FormerConfig) else _upernet(config.head)}
    test_cfg=dict(mode='whole'))
{_TEST_PIPELINE}"""


def _upernet(head: HeadConfig) -> str:
    return f"""\
        in_index=[0, 1, 2, 3],
        pool_scales={head.pool_scales},
        channels={head.channels},
        num_classes={head.num_classes},
        norm_cfg=dict(type='BN', requires_grad=True),
        align_corners=False),"""


def _mask2former(head: Mask2FormerConfig) -> str:
    return f"""\
        feat_channels={head.channels},
        out_channels={head.mask_channels},
        num_classes={head.num_classes},
        num_queries={head.queries},
        num_transformer_feat_level={head.levels},
        pixel_decoder=dict(
            type='MSDeformAttnPixelDecoder',
            num_outs={head.levels},
            norm_cfg=dict(type='GN', num_groups={head.norm_groups}),
            encoder=dict(
                type='DetrTransformerEncoder',
                num_layers={head.encoder_layers},
                transformerlayers=dict(
                    attn_cfgs=dict(
                        type='MultiScaleDeformableAttention',
                        embed_dims={head.channels},
                        num_heads={head.encoder_heads},
                        num_levels={head.levels},
                        num_points={head.points}),
                    ffn_cfgs=dict(feedforward_channels={head.encoder_feedforward})))),
        transformer_decoder=dict(
            type='DetrTransformerDecoder',
            num_layers={head.decoder_layers},
            transformerlayers=dict(
                attn_cfgs=dict(
                    type='MultiheadAttention', embed_dims={head.channels}, num_heads={head.decoder_heads}),
                feedforward_channels={head.decoder_feedforward}))),"""


def checkpoint(model: Segmentor, steps: int) -> dict[str, dict[str, object]]:
    """The checkpoint as mmsegmentation saves it; plain values and tensors, so that it loads with `weights_only`."""
    meta: dict[str, object] = {
        "mmseg_version": "0.27.0",
        "config": training_config(model.config),
        "CLASSES": CLASSES,
        "PALETTE": [list(colour) for colour in PALETTE],
        "epoch": 1,
        "iter": steps,
    }
    return {"meta": meta, "state_dict": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}}

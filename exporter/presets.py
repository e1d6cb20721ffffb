# SPDX-License-Identifier: Apache-2.0
"""Every released segmentation config, under its official name.

Source: the configs of https://github.com/OpenGVLab/InternImage/tree/master/segmentation. All UperNet and
SegFormer ones, Cityscapes and Mapillary included, train a head of 150 classes. Mask2Former has two heads, one of 1024
channels and one of 256; its Mapillary model has the 19 classes of Cityscapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internimage_deploy.exporter.models.config import BackboneConfig, HeadConfig, Mask2FormerConfig, SegmentorConfig
from internimage_deploy.window import Window

BACKBONES = {
    "t": BackboneConfig(64, (4, 4, 18, 4), (4, 8, 16, 32), layer_scale=True),
    "s": BackboneConfig(80, (4, 4, 21, 4), (5, 10, 20, 40), layer_scale=True, post_norm=True),
    "b": BackboneConfig(112, (4, 4, 21, 4), (7, 14, 28, 56), layer_scale=True, post_norm=True),
    "l": BackboneConfig(160, (5, 5, 22, 5), (10, 20, 40, 80), layer_scale=True, post_norm=True, offset_scale=2.0),
    "xl": BackboneConfig(192, (5, 5, 24, 5), (12, 24, 48, 96), layer_scale=True, post_norm=True, offset_scale=2.0),
    "h": BackboneConfig(
        320,
        (6, 6, 32, 6),
        (10, 20, 40, 80),
        res_post_norm=True,
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29),
    ),
    "g": BackboneConfig(
        512,
        (2, 2, 48, 4),
        (16, 32, 64, 128),
        post_norm=True,
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29, 35, 41, 47),
    ),
}

_HEADS = {"upernet": HeadConfig("UPerHead", 512, 150), "segformer": HeadConfig("SegformerHead", 256, 150)}


@dataclass(frozen=True)
class Preset:
    """A released model: its architecture, test scale (long, short) in pixels and data set.

    `window` is the sliding window that a model is evaluated with; None for whole images.
    """

    name: str
    config: SegmentorConfig
    resize: tuple[int, int]
    dataset: str
    window: Window | None = None


def _preset(name: str) -> Preset:
    """Read the preset from its name, HEAD_internimage_VARIANT_CROP_SCHEDULE_DATASET, CROP being S or HxW."""
    head, _, variant, crop, _, dataset = name.split("_")
    dataset = dataset.removeprefix("mapillary2")
    resize = (4 * int(crop), int(crop)) if dataset == "ade20k" else (2048, 1024)
    return Preset(name, SegmentorConfig(BACKBONES[variant], _HEADS[head]), resize, dataset)


def _mask2former(
    name: str,
    head: Callable[[int], Mask2FormerConfig],
    classes: int,
    resize: tuple[int, int],
    dataset: str,
    window: Window | None = None,
) -> Preset:
    return Preset(name, SegmentorConfig(BACKBONES["h"], head(classes)), resize, dataset, window)


def _wide(classes: int) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        channels=1024, num_classes=classes, queries=200, encoder_heads=32, decoder_heads=32, encoder_feedforward=4096,
        decoder_feedforward=4096, mask_channels=1024,
    )  # fmt: skip


def _narrow(classes: int) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        channels=256, num_classes=classes, queries=100, encoder_heads=8, decoder_heads=8, encoder_feedforward=1024,
        decoder_feedforward=2048, mask_channels=256,
    )  # fmt: skip


_MASK2FORMER = (
    _mask2former("mask2former_internimage_h_896_80k_cocostuff2ade20k", _wide, 150, (3584, 896), "ade20k"),
    _mask2former("mask2former_internimage_h_896_80k_cocostuff164k", _wide, 171, (3584, 896), "coco_stuff"),
    _mask2former("mask2former_internimage_h_512_40k_cocostuff164k_to_10k", _wide, 171, (2048, 512), "coco_stuff"),
    _mask2former(
        "mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes", _narrow, 19, (2048, 1024), "cityscapes",
        Window((1024, 1024), (512, 512)),
    ),
    _mask2former(
        "mask2former_internimage_h_896x896_80k_mapillary", _narrow, 19, (2048, 1024), "cityscapes",
        Window((896, 896), (512, 512)),
    ),
    _mask2former("mask2former_internimage_h_480_40k_pascal_context_59", _narrow, 59, (4096, 520), "pascal_context_59"),
    _mask2former("mask2former_internimage_h_480_40k_nyu", _narrow, 40, (640, 480), "nyu_40"),
)  # fmt: skip

PRESETS = {
    name: _preset(name)
    for name in (
        "upernet_internimage_t_512_160k_ade20k",
        "upernet_internimage_s_512_160k_ade20k",
        "upernet_internimage_b_512_160k_ade20k",
        "upernet_internimage_l_640_160k_ade20k",
        "upernet_internimage_xl_640_160k_ade20k",
        "upernet_internimage_h_896_160k_ade20k",
        "upernet_internimage_g_896_160k_ade20k",
        "upernet_internimage_t_512x1024_160k_cityscapes",
        "upernet_internimage_s_512x1024_160k_cityscapes",
        "upernet_internimage_b_512x1024_160k_cityscapes",
        "upernet_internimage_l_512x1024_160k_cityscapes",
        "upernet_internimage_xl_512x1024_160k_cityscapes",
        "upernet_internimage_l_512x1024_160k_mapillary2cityscapes",
        "upernet_internimage_xl_512x1024_160k_mapillary2cityscapes",
        "segformer_internimage_l_512x1024_160k_mapillary2cityscapes",
        "segformer_internimage_xl_512x1024_160k_mapillary2cityscapes",
        "upernet_internimage_l_512x1024_80k_mapillary",
        "upernet_internimage_xl_512x1024_80k_mapillary",
        "segformer_internimage_l_512x1024_80k_mapillary",
        "segformer_internimage_xl_512x1024_80k_mapillary",
    )
} | {preset.name: preset for preset in _MASK2FORMER}


def known_variant(backbone: BackboneConfig) -> str | None:
    """The released variant ("t" to "g") that has these channels, depths and groups, if any."""
    shape = (backbone.channels, backbone.depths, backbone.groups)
    return next((name for name, b in BACKBONES.items() if (b.channels, b.depths, b.groups) == shape), None)

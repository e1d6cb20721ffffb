# SPDX-License-Identifier: Apache-2.0
"""Every released UperNet and SegFormer segmentation config, under its official name.

Source: the configs of https://github.com/OpenGVLab/InternImage/tree/master/segmentation. All of them, Cityscapes and
Mapillary included, train a head of 150 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from internimage_deploy.exporter.models.config import BackboneConfig, HeadConfig, SegmentorConfig

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
    """A released model: its architecture, test scale (long, short) in pixels and data set."""

    name: str
    config: SegmentorConfig
    resize: tuple[int, int]
    dataset: str


def _preset(name: str) -> Preset:
    """Read the preset from its name, HEAD_internimage_VARIANT_CROP_SCHEDULE_DATASET, CROP being S or HxW."""
    head, _, variant, crop, _, dataset = name.split("_")
    dataset = dataset.removeprefix("mapillary2")
    resize = (4 * int(crop), int(crop)) if dataset == "ade20k" else (2048, 1024)
    return Preset(name, SegmentorConfig(BACKBONES[variant], _HEADS[head]), resize, dataset)


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
}


def known_variant(backbone: BackboneConfig) -> str | None:
    """The released variant ("t" to "g") that has these channels, depths and groups, if any."""
    shape = (backbone.channels, backbone.depths, backbone.groups)
    return next((name for name, b in BACKBONES.items() if (b.channels, b.depths, b.groups) == shape), None)

# SPDX-License-Identifier: Apache-2.0
"""Configuration of an InternImage segmentation model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from internimage_deploy.exporter.options import Activation

Norm = Literal["LN", "BN"]


@dataclass(frozen=True)
class BackboneConfig:
    """InternImage's settings, under the names that the official configs use.

    Level i has `channels * 2**i` channels, `depths[i]` blocks and `groups[i]` groups.
    """

    channels: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    mlp_ratio: float = 4.0
    offset_scale: float = 1.0
    layer_scale: bool = False
    post_norm: bool = False
    res_post_norm: bool = False
    dw_kernel_size: int = 3
    center_feature_scale: bool = False
    level2_post_norm_block_ids: tuple[int, ...] = ()  # level 2 normalises after these blocks
    norm_layer: Norm = "LN"
    act_layer: Activation = "GELU"


@dataclass(frozen=True)
class HeadConfig:
    """A decode head's settings. `pool_scales` is UPerHead's pyramid and means nothing to SegformerHead."""

    type: Literal["UPerHead", "SegformerHead"]
    channels: int
    num_classes: int
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)


@dataclass(frozen=True)
class Mask2FormerConfig:
    """Settings of Mask2Former's head.

    `levels` of the backbone's maps, counted from the coarsest, go through the pixel decoder's `encoder_layers`; the
    transformer decoder reads them in turn, one in each of its `decoder_layers`.
    """

    channels: int
    num_classes: int
    queries: int
    encoder_heads: int
    decoder_heads: int
    encoder_feedforward: int
    decoder_feedforward: int
    mask_channels: int
    encoder_layers: int = 6
    decoder_layers: int = 9
    levels: int = 3
    points: int = 4  # sampled per head and level
    norm_groups: int = 32
    type: Literal["Mask2FormerHead"] = "Mask2FormerHead"


@dataclass(frozen=True)
class SegmentorConfig:
    """A backbone and the head that reads its four feature maps."""

    backbone: BackboneConfig
    head: HeadConfig | Mask2FormerConfig

    def asdict(self) -> dict[str, dict[str, object]]:
        """Plain nested dict, for the model card."""
        return asdict(self)

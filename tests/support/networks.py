# SPDX-License-Identifier: Apache-2.0
"""Small segmentors with every part of the released ones, for tests that compare whole networks."""

from __future__ import annotations

from internimage_deploy.exporter.models import BackboneConfig, HeadConfig, Segmentor, SegmentorConfig, build_random

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


def small(family: str = "t", head: str = "UPerHead", *, classes: int = 7, seed: int = 0) -> Segmentor:
    """A small segmentor of one family, with random weights under which everything matters."""
    return build_random(SegmentorConfig(FAMILIES[family], HeadConfig(head, 32, classes)), seed)  # type: ignore[arg-type]

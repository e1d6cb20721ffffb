# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's masks and queries: products where the maps are small, and constants computed once.

`attention-masks`. A decoder layer masks by sign(resize(e M)), e (Q, C) the queries' mask embeddings and M (C, H, W) the
mask features. The resize acts on rows and columns, the product on channels, so they commute: e resize(M). M is resized
once for each of the levels, and the nine products are taken there. Sizes are whole multiples, so that bilinear resizing
with half-pixel centres is the average of the four pixels in the middle of each cell. Exact: linearity only.

`mask-feature`. M = V y + b is a 1x1 convolution of the pixel decoder's map y, and e = A u + c the last layer of the
mask embedding. So e . M = (V'A u + V'c) . y + (b'A u + b'c): one layer of D + 1 outputs, D for the map y itself and one
for a constant, takes the place of both. Exact: associativity.

`first-query`. Before the first decoder layer the queries are weights. Their mask embedding and the first query
projection are computed here, once. Exact: the same operations.

`sampling-gemm`. Offsets and attention weights of a deformable attention read the same tokens: one product with the rows
of both below each other, as `offset-mask-gemm` for DCNv3. Exact: each output is the same dot product.

Cost of the head of 1024 channels and 200 queries at 896x896, fp32, in multiply-adds: mask products 103 G before, 20 G
after, and nine tensors of 40 MB less; mask_feature 53 G before, none after, and a tensor of 205 MB less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.exporter.models import MSDeformAttention, Segmentor
from internimage_deploy.exporter.models.mask2former import (
    Attention,
    AttentionMasks,
    Mask2FormerHead,
    linear,
    mask_logits,
)
from internimage_deploy.exporter.models.positions import LevelPositions
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite, modules_of


class ResizedFirst(AttentionMasks):
    """`AttentionMasks` that resizes the mask features, once, instead of every layer's mask logits."""

    def prepare(self, mask_features: Tensor, levels: Sequence[LevelPositions]) -> list[Tensor]:
        # Levels count from stride 32 up; the features have stride 4.
        return [middle_average(mask_features, 8 >> index) for index in range(len(levels))]

    def forward(self, embedding: Tensor, mask_features: Tensor, level: LevelPositions) -> Tensor:
        return self.decision(mask_logits(embedding, mask_features).flatten(2))


def middle_average(x: Tensor, factor: int) -> Tensor:
    """Bilinear resize (half-pixel centres) to 1 / `factor`, a power of two: (N, C, H, W) to (N, C, H/factor, W/factor).

    The centre of a cell of an even number of pixels lies between four pixels.
    """
    if factor == 1:
        return x
    before = factor // 2 - 1
    return F.avg_pool2d(x[:, :, before:, before:], 2, stride=factor)


def resize_mask_features(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Resize the mask features instead of the mask logits."""
    head = segmentor.decode_head
    if not isinstance(head, Mask2FormerHead):
        return False
    head.attention_masks = ResizedFirst()
    return True


def fold_mask_feature(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Take the products with the map that the mask features are read from."""
    head = segmentor.decode_head
    if not isinstance(head, Mask2FormerHead):
        return False
    config, feature = segmentor.config.head, head.pixel_decoder.mask_feature
    last = head.mask_embed[-1]
    assert isinstance(feature, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    assert feature.bias is not None
    queries, channels, masks = len(head.query_feat.weight), config.channels, feature.out_channels
    if queries * channels >= masks * (channels + queries):  # few mask channels: the product is cheaper as it is
        return False
    with torch.no_grad():
        both = torch.cat((feature.weight.flatten(1).T, feature.bias[None]))  # (D + 1, C)
        head.mask_embed[-1] = linear(both @ last.weight, both @ last.bias)
    head.pixel_decoder.mask_feature = nn.Identity()
    return True


def precompute_first_query(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Compute what the first decoder layer does to the queries alone."""
    head = segmentor.decode_head
    if not isinstance(head, Mask2FormerHead):
        return False
    cross_attention = head.transformer_decoder.layers[0].get_submodule("attentions.0")
    assert isinstance(cross_attention, Attention)
    with torch.no_grad():
        query = head.query_feat.weight[None]
        head.first_embedding = nn.Parameter(head.mask_embedding(query), requires_grad=False)
        first = cross_attention.attn.query(query + head.query_embed.weight)
        cross_attention.fixed_query = nn.Parameter(first, requires_grad=False)
    return True


def join_sampling(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Compute offsets and attention weights of every deformable attention in one product."""
    found = False
    for layer in modules_of(segmentor, MSDeformAttention):
        parts = (layer.sampling_offsets, layer.attention_weights)
        if parts[0] is None or parts[1] is None:
            continue
        weight, bias = (torch.cat([getattr(part, name).detach() for part in parts]) for name in ("weight", "bias"))
        layer.sampling, layer.sampling_offsets, layer.attention_weights = linear(weight, bias), None, None
        found = True
    return found


ATTENTION_MASKS = Rewrite(
    "attention-masks", "Mask2Former's mask features resized once instead of every layer's masks", resize_mask_features
)
MASK_FEATURE = Rewrite(
    "mask-feature", "Mask2Former's mask features folded into the mask embedding's last layer", fold_mask_feature
)
FIRST_QUERY = Rewrite(
    "first-query", "what Mask2Former's first layer does to the queries alone, computed once", precompute_first_query
)
SAMPLING_GEMM = Rewrite(
    "sampling-gemm", "offsets and weights of multi-scale deformable attention in one matrix product", join_sampling
)

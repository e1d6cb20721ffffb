# SPDX-License-Identifier: Apache-2.0
"""Backbone and head together, and the ways to fill them with weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import HeadConfig, Mask2FormerConfig, SegmentorConfig
from internimage_deploy.exporter.models.heads import SegformerHead, UPerHead
from internimage_deploy.exporter.models.internimage import InternImage
from internimage_deploy.exporter.models.mask2former import Mask2FormerHead


class Segmentor(nn.Module):
    """(N, 3, H, W) float, normalised, H and W multiples of 32, to logits (N, classes, H/4, W/4).

    Of a Mask2Former these are semantic scores, see `Mask2FormerHead`.
    """

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        self.config = config
        self.divides_by_std = False  # True: the input is centred only, and the first convolution does the division
        self.backbone = InternImage(config.backbone)
        in_channels = [config.backbone.channels * 2**i for i in range(len(config.backbone.depths))]
        self.decode_head = _head(in_channels, config.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


def _head(in_channels: list[int], config: HeadConfig | Mask2FormerConfig) -> nn.Module:
    if isinstance(config, Mask2FormerConfig):
        return Mask2FormerHead(in_channels, config)
    return (UPerHead if config.type == "UPerHead" else SegformerHead)(in_channels, config)


def build_without_weights(config: SegmentorConfig) -> Segmentor:
    """A segmentor in evaluation mode whose tensors have names and shapes alone (PyTorch's meta device).

    No memory is spent on initial weights: the 1.1 B of InternImage-H count.
    """
    with torch.device("meta"):
        return Segmentor(config).eval()


def build_with(config: SegmentorConfig, state_dict: Mapping[str, Tensor]) -> Segmentor:
    """A segmentor in evaluation mode that uses the tensors of `state_dict` themselves, without a copy.

    Raises:
        RuntimeError: the state dict's names or shapes differ from the model's.
    """
    segmentor = build_without_weights(config)
    segmentor.load_state_dict(state_dict, assign=True)
    return segmentor.requires_grad_(False)


def build_random(config: SegmentorConfig, seed: int = 0) -> Segmentor:
    """A segmentor with random weights under which every part of the network matters.

    Standard initialisation leaves offsets at zero and masks uniform, so a wrong export could pass unseen. Here
    matrices have unit gain, scales lie around 1, variances above 1, and biases around 0.
    """
    segmentor = build_without_weights(config).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in segmentor.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
            continue
        tensor.normal_(generator=generator)
        if tensor.ndim >= 2:
            tensor.div_(math.sqrt(math.prod(tensor.shape[1:])))
        elif name.endswith("running_var"):
            tensor.abs_().mul_(0.2).add_(1)
        elif name.endswith(("weight", "gamma1", "gamma2")):
            tensor.mul_(0.1).add_(1)
        else:
            tensor.mul_(0.1)
    for pattern, gain in _mask2former_gains(config.head) if isinstance(config.head, Mask2FormerConfig) else ():
        for name in fnmatch.filter(segmentor.state_dict(), f"decode_head.{pattern}"):
            segmentor.get_parameter(name).mul_(gain)
    return segmentor


def _mask2former_gains(head: Mask2FormerConfig) -> Sequence[tuple[str, float]]:
    """Factors under which random queries differ from each other in every layer, and many classes win.

    With unit gain throughout, what all queries have in common grows from layer to layer, and one class wins everywhere.
    """
    unit = math.sqrt(head.channels)  # from unit length to unit variance
    return (
        ("query_*.weight", unit),
        ("level_embed.weight", 2.0),
        ("pixel_decoder.level_encoding.weight", unit / 2),
        ("transformer_decoder.*.attentions.0.attn.out_proj.weight", 0.2),
        ("transformer_decoder.*.attentions.1.attn.out_proj.weight", 0.1),
        ("transformer_decoder.*.ffns.0.layers.1.weight", 0.15),
        ("mask_embed.4.weight", 30 / unit),  # mask logits of a few units, whatever the width
        ("cls_embed.weight", 6.0),
    )

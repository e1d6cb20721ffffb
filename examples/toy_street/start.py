# SPDX-License-Identifier: Apache-2.0
"""The weights that a training starts from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from recipe import CONFIGS
from torch import Tensor, nn

from internimage_deploy.exporter.models import DCNv3, Mask2FormerConfig, MSDeformAttention, Segmentor
from internimage_deploy.exporter.models.mask2former import AttentionWeights

# Its backbone knows the scenes; a Mask2Former starts from it.
TRAINED = Path(__file__).with_name("toy_street.pth")


def start(head: str) -> Segmentor:
    """An untrained model; with Mask2Former's head its backbone is that of `TRAINED`."""
    model = Segmentor(CONFIGS[head])
    initialise(model)
    if isinstance(model.config.head, Mask2FormerConfig):
        prefix = "backbone."
        weights: dict[str, Tensor] = torch.load(TRAINED, weights_only=True)["state_dict"]
        model.backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model


def initialise(model: Segmentor) -> None:
    """The official initial weights.

    DCNv3 starts as an even 3x3 average over an unmoved grid. Deformable attention starts with equal weights and with
    points that lie 1, 2, ... pixels away, in a direction of its own for each head.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, DCNv3):
            nn.init.zeros_(module.offset.weight)
            nn.init.zeros_(module.mask.weight)
        elif isinstance(module, MSDeformAttention):
            nn.init.zeros_(module.attention_weights.weight)
            nn.init.zeros_(module.sampling_offsets.weight)
            module.sampling_offsets.bias.data = _rays(module).flatten()
        elif isinstance(module, AttentionWeights):
            nn.init.xavier_uniform_(module.in_proj_weight)


def _rays(attention: MSDeformAttention) -> Tensor:
    """Offsets (heads, levels, points, 2) in pixels."""
    angle = torch.arange(attention.heads) * (2 * math.pi / attention.heads)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    distance = torch.arange(1, attention.points + 1)[:, None]
    return (direction[:, None, None] * distance).expand(-1, attention.levels, -1, -1)

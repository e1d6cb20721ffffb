# SPDX-License-Identifier: Apache-2.0
"""The input's standard deviation folded into the first convolution.

Identity. The network sees (p - mean) / std of an image p. The first convolution is linear:
K ((p - mean) / std) = (K / std) (p - mean), dividing the kernel's columns of each colour.

Why exact: the convolution pads with zeros, and zero stands for the mean colour. Folding the mean as well would pad with
black instead, and be wrong along the border; p - mean is therefore still computed, so that zero padding means what it
did, and only the division, which keeps zero at zero, moves.

Cost at 512x512, fp32: 0.8 M multiplications and a read and a write of 3.1 MB each.
"""

from __future__ import annotations

import torch
from torch import nn

from internimage_deploy.card import IMAGENET_STD
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite


def fold_standard_deviation(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Let the first convolution divide; only where the graph normalises at all."""
    if options.input != "uint8":
        return False
    conv = segmentor.backbone.patch_embed.conv1
    std = torch.tensor(IMAGENET_STD).to(conv.weight).view(1, 3, 1, 1)
    with torch.no_grad():
        conv.weight = nn.Parameter(conv.weight / std, requires_grad=False)
    segmentor.divides_by_std = True
    return True


STEM_NORMALISATION = Rewrite(
    "stem-normalisation",
    "the standard deviation folded into the first convolution",
    fold_standard_deviation,
)

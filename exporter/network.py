# SPDX-License-Identifier: Apache-2.0
"""The network as it is exported: pixels in, labels or logits out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD, label_dtype
from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.options import ExportOptions


class Network(nn.Module):
    """A segmentor between the input and the output of `options`; see `ExportOptions`.

    The parts keep the segmentor's names, so that names in the graph equal those in the checkpoint.
    """

    def __init__(self, segmentor: Segmentor, options: ExportOptions) -> None:
        super().__init__()
        self.preprocess = Normalize(centre_only=segmentor.divides_by_std) if options.input == "uint8" else None
        self.backbone = segmentor.backbone
        self.decode_head = segmentor.decode_head
        self.postprocess = Labels(segmentor.config.head.num_classes) if options.emit == "labels" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.preprocess is not None:
            x = self.preprocess(x)
        x = self.decode_head(self.backbone(x))
        return x if self.postprocess is None else self.postprocess(x)


class Normalize(nn.Module):
    """(N, H, W, 3) uint8 RGB to (N, 3, H, W) float32 with ImageNet's mean and, unless `centre_only`, its deviation."""

    mean: Tensor
    scale: Tensor | None

    def __init__(self, *, centre_only: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("scale", None if centre_only else 1 / torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # The cast comes first because TensorRT takes uint8 nowhere but in a cast.
        x = x.float().permute(0, 3, 1, 2) - self.mean
        return x if self.scale is None else x * self.scale


class Labels(nn.Module):
    """Logits (N, classes, H/4, W/4) to labels (N, H, W), computed as mmsegmentation does at network size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.dtype: torch.dtype = getattr(torch, label_dtype(classes).__name__)

    def forward(self, logits: Tensor) -> Tensor:
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1).to(self.dtype)

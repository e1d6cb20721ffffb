# SPDX-License-Identifier: Apache-2.0
"""Batch norms folded into the convolutions before them.

Identity. In inference a batch norm is y -> s * y + t per channel, s = weight / sqrt(var + eps), t = bias - mean * s. A
convolution is linear in its kernel, so s * (K x + b) + t = (s K) x + (s b + t).

Why exact: the padding is of the convolution's input and stays zero; s and t act on its output.

Cost, UPerHead of InternImage at 512x512, fp32: 30.6 M multiply-adds of the batch norms and, where the runtime does not
fold them itself, one read and one write of every map, 244 MB, are gone. ONNX Runtime folds Conv + BatchNormalization on
its own but not across the sum that `upernet-fusion` leaves between them, so this rewrite comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from internimage_deploy.exporter.models import DCNv3, Segmentor
from internimage_deploy.exporter.models.internimage import Downsample, Stem
from internimage_deploy.exporter.models.layers import ConvBlock
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite


def fold_batch_norms(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Fold every batch norm that follows a convolution; norm layers of the backbone too, where they are batch norms."""
    found = False
    for conv, owner, name in list(_followed(segmentor)):
        bn = owner.get_submodule(name)
        if not isinstance(bn, nn.BatchNorm2d):
            continue
        assert bn.running_mean is not None
        assert bn.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        for parameter in (conv.weight, conv.bias):
            parameter.requires_grad_(False)
        setattr(owner, name, nn.Identity())
        found = True
    return found


def _followed(segmentor: Segmentor) -> Iterator[tuple[nn.Conv2d, nn.Module, str]]:
    """Every convolution, and where the norm after it is: its parent and its name there."""
    for module in segmentor.modules():
        if isinstance(module, ConvBlock):
            yield module.conv, module, "bn"
        elif isinstance(module, Stem):
            yield module.conv1, module.norm1, "0"
            yield module.conv2, module.norm2, "0"
        elif isinstance(module, Downsample):
            yield module.conv, module.norm, "0"
        elif isinstance(module, DCNv3):
            conv, norm = module.dw_conv[0], module.dw_conv[1]
            assert isinstance(conv, nn.Conv2d)
            yield conv, norm, "0"


BATCH_NORM = Rewrite("batch-norm", "batch norms folded into the convolutions before them", fold_batch_norms)

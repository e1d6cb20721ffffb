# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's map of stride 4: one convolution taken apart into what each of its inputs needs.

Identity. The plain layer is conv3x3(GN(L f) + up(m)): f (C0, H, W) the backbone's first map, L its 1x1 convolution to D
channels, GN a group norm, m (D, H/2, W/2) the finest memory. A convolution of a sum is the sum of the convolutions.

conv3x3(up(m)) is applied at the low resolution, as in UPerNet's fusion (`fusion`).

GN(z) = s z + t per channel, where s and t follow from the mean and the variance of z = L f over each group. Both follow
from the mean of f and its covariance over the pixels, (C0, C0): the mean of z is L mean(f), and the variance of channel
c is L_c cov(f) L_c', so z itself is never needed. Then

    conv3x3(s L f + t) = conv3x3 with the kernel  K[o, i] = sum_c W[o, c] s_c L[c, i]  on f,
                         and with the kernel      K[o, C0] = sum_c W[o, c] t_c         on a map of ones,

where the zero padding of the map of ones is what the plain layer's padding does to t. The kernel depends on the image,
so the convolution is written as three matrix products, one for each row of the kernel.

Why exact: linearity, and the definition of the variance. The covariance is that of centred values: nothing cancels.

Cost for the head of 1024 channels on InternImage-H (C0 = 320) at 896x896, fp32: 16 G (lateral) + 474 G multiply-adds
before; after, 148 G (f) + 118 G (m) + 5 G (covariance) + 3 G (kernel) = 274 G, 56 %. It pays where C0 is well below D:
for the head of 256 channels it does not, and is not applied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.models.mask2former import Mask2FormerHead
from internimage_deploy.exporter.models.pixel_decoder import GroupNormConv
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite
from internimage_deploy.exporter.rewrites.fusion import UpsampledConv


class Affine(nn.Module):
    """GN(L f) as an affine map of f: from f, (N, C0, H, W), to scale times L and shift, (N, D, C0 + 1)."""

    def __init__(self, plain: GroupNormConv) -> None:
        super().__init__()
        self.groups, self.eps = plain.gn.num_groups, plain.gn.eps
        self.lateral = nn.Parameter(plain.conv.weight.detach().flatten(1), requires_grad=False)
        self.scale, self.shift = plain.gn.weight, plain.gn.bias

    def forward(self, feature: Tensor) -> Tensor:
        pixels = feature.flatten(2)
        mean = pixels.mean(-1, keepdim=True)
        centred = pixels - mean
        covariance = centred @ (centred.transpose(1, 2) / pixels.shape[2])
        means = (self.lateral @ mean).unflatten(1, (self.groups, -1))  # (N, groups, D / groups, 1)
        variances = ((self.lateral @ covariance) * self.lateral).sum(-1, keepdim=True).unflatten(1, (self.groups, -1))
        group_mean = means.mean(2, keepdim=True)
        variance = (variances + (means - group_mean).square()).mean(2, keepdim=True)
        scale = self.scale.view(self.groups, -1, 1) / (variance + self.eps).sqrt()
        shift = self.shift.view(self.groups, -1, 1) - group_mean * scale
        return torch.cat((scale.flatten(1, 2) * self.lateral, shift.flatten(1, 2)), -1)


class FineMap(nn.Module):
    """relu(GN(conv3x3(GN(L f) + up(m)))): (N, C0, H, W) and (N, D, H/2, W/2) to (N, D, H, W)."""

    def __init__(self, lateral: GroupNormConv, output: GroupNormConv) -> None:
        super().__init__()
        self.affine = Affine(lateral)
        # Rows of the kernel, (3 * O * 3, D), in the order (dy, o, dx).
        kernel = output.conv.weight.detach().permute(2, 0, 3, 1)
        self.kernel = nn.Parameter(kernel.reshape(-1, kernel.shape[3]), requires_grad=False)
        self.upsampled = UpsampledConv(output.conv.weight)
        self.gn = output.gn

    def forward(self, feature: Tensor, memory: Tensor) -> Tensor:
        height, width = feature.shape[2:]
        return self.gn(self.upsampled(memory, height, width) + self._convolve(feature)).relu()

    def _convolve(self, feature: Tensor) -> Tensor:
        """conv3x3(GN(L f)): (N, C0, H, W) to (N, D, H, W)."""
        batch, _, height, width = feature.shape
        kernel = (self.kernel @ self.affine(feature)).unflatten(1, (3, -1, 3)).flatten(3)  # (N, dy, O, dx * (C0 + 1))
        padded = F.pad(torch.cat((feature, torch.ones_like(feature[:, :1])), 1), (1, 1, 1, 1))
        columns = torch.cat([padded[:, :, :, dx : dx + width] for dx in range(3)], 1)
        rows = [columns[:, :, dy : dy + height].flatten(2) for dy in range(3)]
        y = kernel[:, 0] @ rows[0] + kernel[:, 1] @ rows[1] + kernel[:, 2] @ rows[2]
        return y.view(batch, -1, height, width)


def split_fine_map(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Take the convolution of the stride-4 map apart where that is cheaper."""
    head = segmentor.decode_head
    if not isinstance(head, Mask2FormerHead):
        return False
    decoder = head.pixel_decoder
    if not decoder.lateral_convs:
        return False
    lateral, output = decoder.lateral_convs[0], decoder.output_convs[0]
    assert isinstance(lateral, GroupNormConv)
    assert isinstance(output, GroupNormConv)
    channels, inputs = lateral.conv.weight.shape[:2]
    # Per pixel: lateral and convolution, against the convolution of f, a quarter of that of m, and the covariance.
    before = channels * inputs + 9 * channels * channels
    after = 9 * channels * (inputs + 1) + 9 * channels * channels / 4 + inputs * inputs
    if after >= 0.8 * before:
        return False
    decoder.fine_map = FineMap(lateral, output)
    decoder.lateral_convs, decoder.output_convs = nn.ModuleList(), nn.ModuleList()
    return True


FINE_MAP = Rewrite(
    "fine-map", "Mask2Former's stride-4 convolution applied to each of its inputs where that is small", split_fine_map
)

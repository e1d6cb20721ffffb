# SPDX-License-Identifier: Apache-2.0
"""DCNv3 in plain PyTorch: the operator, and the module that computes its offsets and mask.

Source: InternImage, https://arxiv.org/abs/2211.05778. `internimage_deploy.operators.contract` states the operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import Norm
from internimage_deploy.exporter.models.layers import activation, norm
from internimage_deploy.exporter.options import Activation

Pair = int | tuple[int, int]


def dcnv3(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel: Pair = 3,
    stride: Pair = 1,
    pad: Pair = 1,
    dilation: Pair = 1,
    group: int,
    offset_scale: float = 1.0,
    mask_softmax: bool = False,
) -> Tensor:
    """Deformable convolution v3, forward; differentiable.

    Args:
        input: (N, H, W, G*C), float32, float16 or bfloat16.
        offset: (N, Ho, Wo, G*K*2), pairs (x, y) in pixels; K points, x outer, y inner.
        mask: (N, Ho, Wo, G*K), weights, or logits over K when `mask_softmax`.
        kernel: one int, or (h, w), as are `stride`, `pad` and `dilation`.
        stride: in pixels.
        pad: in pixels, zeros on both sides.
        dilation: in pixels.
        group: G.
        offset_scale: scales the whole sampling grid, the kernel's own points included.
        mask_softmax: True when `mask` holds logits.

    Returns:
        (N, Ho, Wo, G*C) in the dtype of `input`. Coordinates, weights and sums are float32 (float64 for float64).
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = _pair(kernel), _pair(stride), _pair(pad), _pair(dilation)
    n, height, width, channels = input.shape
    _, out_h, out_w, _ = offset.shape
    points = kh * kw
    dtype = torch.promote_types(input.dtype, torch.float32)
    device = input.device

    # Coordinates are fractions of the padded input, summed in the order of the official code, so that even the rounding
    # agrees with what the weights were trained under.
    padded = F.pad(input.to(dtype), (0, 0, pw, pw, ph, ph))
    size_y, size_x = height + 2 * ph, width + 2 * pw
    centre_y, centre_x = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    point_y = (torch.arange(kh, device=device, dtype=dtype) * dh - centre_y).repeat(kw) / size_y
    point_x = (torch.arange(kw, device=device, dtype=dtype) * dw - centre_x).repeat_interleave(kh) / size_x
    base_y = (torch.arange(out_h, device=device, dtype=dtype) * sh + (centre_y + 0.5)) / size_y
    base_x = (torch.arange(out_w, device=device, dtype=dtype) * sw + (centre_x + 0.5)) / size_x

    shift = offset.to(dtype).view(n, out_h, out_w, group, points, 2) * offset_scale
    x = (base_x[:, None, None] + point_x * offset_scale) + shift[..., 0] / size_x
    y = (base_y[:, None, None, None] + point_y * offset_scale) + shift[..., 1] / size_y
    grid = 2 * torch.stack((x, y), -1) - 1
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * group, out_h, out_w * points, 2)

    weights = mask.to(dtype).view(n, out_h, out_w, group, points)
    if mask_softmax:
        weights = weights.softmax(-1)
    weights = weights.permute(0, 3, 1, 2, 4).reshape(n * group, 1, out_h, out_w, points)

    planes = padded.permute(0, 3, 1, 2).reshape(n * group, channels // group, size_y, size_x)
    samples = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    samples = samples.view(n * group, channels // group, out_h, out_w, points)
    output = (samples * weights).sum(-1)
    return output.view(n, channels, out_h, out_w).permute(0, 2, 3, 1).contiguous().to(input.dtype)


class DCNv3(nn.Module):
    """The DCNv3 layer: (N, H, W, C) to (N, H, W, C), 3x3, stride 1.

    A depthwise convolution of the input gives the offsets and the mask; the operator samples a projection of the
    input. `operator` is what computes the deformable convolution: `dcnv3`, or whatever stands for it in an export.
    """

    operator: Callable[..., Tensor]

    def __init__(
        self,
        channels: int,
        group: int,
        *,
        dw_kernel_size: int,
        offset_scale: float,
        center_feature_scale: bool,
        norm_layer: Norm,
        act_layer: Activation,
    ) -> None:
        super().__init__()
        self.channels, self.group, self.offset_scale = channels, group, offset_scale
        self.kernel, self.stride, self.pad, self.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        points = self.kernel[0] * self.kernel[1]
        self.operator = dcnv3
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, dw_kernel_size, padding=(dw_kernel_size - 1) // 2, groups=channels),
            norm(channels, norm_layer, "channels_first", "channels_last"),
            activation(act_layer),
        )
        self.offset: nn.Linear | None = nn.Linear(channels, group * points * 2)
        self.mask: nn.Linear | None = nn.Linear(channels, group * points)
        self.offset_mask: nn.Linear | None = None  # both in one, when a rewrite has joined them
        self.mask_softmax = False  # whether the operator takes logits and does the softmax itself
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H, W, C)."""
        projected = self.input_proj(x)
        context = self.dw_conv(x.permute(0, 3, 1, 2))
        offset, mask = self.sampling(context)
        y = self.operator(
            projected,
            offset,
            mask,
            kernel=self.kernel,
            stride=self.stride,
            pad=self.pad,
            dilation=self.dilation,
            group=self.group,
            offset_scale=self.offset_scale,
            mask_softmax=self.mask_softmax,
        )
        if self.center_feature_scale:
            y = self.blend_centre(y, projected, context)
        return self.output_proj(y)

    def sampling(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (N, H, W, G*K*2), and the mask (N, H, W, G*K) as the operator takes it."""
        if self.offset_mask is not None:
            both = self.offset_mask(context)
            third = both.shape[-1] // 3
            offset, mask = both[..., : 2 * third], both[..., 2 * third :]
        else:
            assert self.offset is not None
            assert self.mask is not None
            offset, mask = self.offset(context), self.mask(context)
        if not self.mask_softmax:
            mask = mask.unflatten(-1, (self.group, -1)).softmax(-1).flatten(-2)
        return offset, mask

    def blend_centre(self, sampled: Tensor, projected: Tensor, context: Tensor) -> Tensor:
        """Mix the sampled features with the unsampled ones; one learnt weight per group and pixel."""
        weight = F.linear(context, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
        weight = weight.repeat_interleave(self.channels // self.group, dim=-1)
        return sampled * (1 - weight) + projected * weight


def _pair(value: Pair) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from internimage_deploy.exporter.models import (
    BackboneConfig,
    HeadConfig,
    SegmentorConfig,
    build_random,
    dcnv3,
)
from internimage_deploy.operators.contract import output_size
from support import golden
from support.small_models import golden_segmentor


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_features_and_logits_equal_the_official_ones(name):
    segmentor = golden_segmentor(name)
    expected = golden.arrays(name)
    with torch.inference_mode():
        features = segmentor.backbone(torch.from_numpy(golden.network_input(name)))
        logits = segmentor.decode_head(features)
    for index, feature in enumerate(features):
        np.testing.assert_allclose(feature.numpy(), expected[f"feature{index}"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(golden.case("dcnv3_op")))
def test_operator_equals_the_official_one(name):
    case, data = golden.case("dcnv3_op")[name], golden.arrays("dcnv3_op")
    x, offset, mask = (torch.from_numpy(data[f"{name}.{part}"]) for part in ("input", "offset", "mask"))
    settings = {key: case[key] for key in ("kernel", "stride", "pad", "dilation", "group", "offset_scale")}
    output = dcnv3(x, offset, mask, **settings)
    np.testing.assert_allclose(output.numpy(), data[f"{name}.output"], atol=1e-5, rtol=0)


def by_hand(x, offset, mask, kernel, stride, pad, dilation, group, scale):
    """The contract's equations, one scalar at a time."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, pad, dilation
    n, height, width, channels = x.shape
    _, out_h, out_w, _ = offset.shape
    per_group = channels // group
    ry, rx = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    output = np.zeros((n, out_h, out_w, channels))
    for b, i, j, g, k in np.ndindex(n, out_h, out_w, group, kh * kw):
        kx, ky = k // kh, k % kh
        dx, dy = offset[b, i, j, (g * kh * kw + k) * 2 :][:2]
        py = i * sh - ph + ry + (ky * dh - ry + dy) * scale
        px = j * sw - pw + rx + (kx * dw - rx + dx) * scale
        y0, x0 = int(np.floor(py)), int(np.floor(px))
        part = slice(g * per_group, (g + 1) * per_group)
        for yy, xx in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
            if 0 <= yy < height and 0 <= xx < width:
                weight = (1 - abs(py - yy)) * (1 - abs(px - xx)) * mask[b, i, j, g * kh * kw + k]
                output[b, i, j, part] += weight * x[b, yy, xx, part]
    return output


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "dilation", "scale"),
    [
        pytest.param((3, 3), (1, 1), (2, 0), (1, 1), 1.0, id="unequal-pads"),
        pytest.param((3, 5), (2, 1), (1, 3), (1, 2), 2.0, id="everything-unequal"),
        pytest.param((2, 4), (1, 2), (0, 1), (2, 1), 0.5, id="even-kernel"),
        pytest.param((1, 3), (3, 2), (0, 0), (1, 1), 1.5, id="flat-kernel"),
    ],
)
def test_operator_follows_the_contract_where_the_official_code_does_not(kernel, stride, pad, dilation, scale):
    rng = np.random.default_rng(0)
    n, height, width, group, per_group = 2, 9, 11, 3, 2
    out_h = output_size(height, kernel[0], stride[0], pad[0], dilation[0])
    out_w = output_size(width, kernel[1], stride[1], pad[1], dilation[1])
    points = kernel[0] * kernel[1]
    x = rng.standard_normal((n, height, width, group * per_group))
    offset = rng.uniform(-3, 3, (n, out_h, out_w, group * points * 2))
    mask = rng.uniform(0, 1, (n, out_h, out_w, group * points))
    output = dcnv3(
        *map(torch.from_numpy, (x, offset, mask)),
        kernel=kernel,
        stride=stride,
        pad=pad,
        dilation=dilation,
        group=group,
        offset_scale=scale,
    )
    expected = by_hand(x, offset, mask, kernel, stride, pad, dilation, group, scale)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-10)


def test_mask_softmax_takes_logits():
    generator = torch.Generator().manual_seed(0)
    x, offset = torch.randn(1, 6, 7, 8, generator=generator), torch.randn(1, 6, 7, 36, generator=generator)
    logits = torch.randn(1, 6, 7, 18, generator=generator)
    weights = logits.view(1, 6, 7, 2, 9).softmax(-1).flatten(-2)
    from_logits = dcnv3(x, offset, logits, group=2, mask_softmax=True)
    torch.testing.assert_close(from_logits, dcnv3(x, offset, weights, group=2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm_layer", ["LN", "BN"])
@pytest.mark.parametrize("act_layer", ["GELU", "GELU_tanh", "ReLU", "SiLU"])
def test_every_norm_and_activation_runs_and_differs(norm_layer, act_layer):
    def logits(**settings):
        backbone = BackboneConfig(8, (1, 1, 1, 1), (1, 2, 4, 8), **settings)
        segmentor = build_random(SegmentorConfig(backbone, HeadConfig("SegformerHead", 8, 3)))
        return segmentor(torch.linspace(-2, 2, 3 * 32 * 64).view(1, 3, 32, 64))

    output = logits(norm_layer=norm_layer, act_layer=act_layer)
    assert output.shape == (1, 3, 8, 16)
    assert output.isfinite().all()
    if (norm_layer, act_layer) != ("LN", "GELU"):
        assert (output - logits(norm_layer="LN", act_layer="GELU")).abs().max() > 1e-5

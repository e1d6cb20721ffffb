# SPDX-License-Identifier: Apache-2.0
"""The gate of DCNv3's kernels that interpolate in float16: the labels of whole networks.

The operator's operands are rounded to float16, as in a float16 engine, and its kernel runs on the host; the rest of the
network is float32 PyTorch, so that nothing else moves a label.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
from internimage_deploy.exporter.checkpoint import read_checkpoint
from internimage_deploy.exporter.models import DCNv3
from internimage_deploy.trt_plugins import host
from support import golden
from support.small_models import golden_segmentor

TOY_STREET = Path(__file__).parents[2] / "examples" / "toy_street"
FLOAT, HALF = 8, 28  # tactics of the same geometry: two vectors per thread
MORE_CHANGED_LABELS = 1e-3  # of all labels
MORE_ERROR = 1.5  # times the logits' root mean square error with float32 interpolation


def operator(tactic, served):
    """DCNv3 by the float16 kernel of `tactic`; adds the body that served a call to `served`."""

    def run(input, offset, mask, *, group, **op):
        image, channels = input.shape[:3], input.shape[3] // group
        # The kernels with bodies to choose from are compiled for groups of 16 and 32 channels: zeros fill them up.
        width = 16 if channels <= 16 else 32
        filled = F.pad(input.view(*image, group, channels), (0, width - channels)).flatten(-2)
        operands = [tensor.half().numpy() for tensor in (filled, offset, mask)]
        params, output = host.make_params(*operands, group=group, allow_half=True, **op)
        served.add(host.DCNV3.run(params, "float16", tactic=tactic).body)
        return torch.from_numpy(output.astype(np.float32)).view(*image, group, width)[..., :channels].flatten(-2)

    return run


def toy_street():
    """A trained network, and images that it has never seen."""
    sys.path.insert(0, str(TOY_STREET))
    try:
        import scenes
    finally:
        sys.path.pop(0)
    images = np.stack([scenes.scene(scenes.FIRST_HELD_OUT + index).image for index in range(2)])
    normalised = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return read_checkpoint(TOY_STREET / "toy_street.pth").segmentor.eval(), normalised.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["toy_street", *golden.NETWORKS])
def test_labels_hardly_change(name):
    segmentor, input = toy_street() if name == "toy_street" else (golden_segmentor(name), golden.network_input(name))
    layers = [module for module in segmentor.modules() if isinstance(module, DCNv3)]

    def compute():
        with torch.inference_mode():
            logits = segmentor.decode_head(segmentor.backbone(torch.from_numpy(input)))
        return F.interpolate(logits, scale_factor=4, mode="bilinear").argmax(1).numpy(), logits.numpy()

    labels, logits = compute()
    changed, errors = {}, {}
    for tactic, body in ((FLOAT, "branching"), (HALF, "half")):
        served: set[str] = set()
        for layer in layers:
            layer.mask_softmax, layer.operator = True, operator(tactic, served)
        own_labels, own_logits = compute()
        assert served == {body}
        changed[tactic] = np.mean(own_labels != labels)
        errors[tactic] = np.sqrt(np.mean(np.square(own_logits - logits)))
    assert errors[FLOAT] > 0
    assert errors[HALF] <= MORE_ERROR * errors[FLOAT]
    assert changed[HALF] <= changed[FLOAT] + MORE_CHANGED_LABELS

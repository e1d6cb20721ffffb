# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/networks.py on the CPU, in float32 and at a small size: what it times computes the right thing."""

import correctness
import networks
import pytest
import torch
from rows import OK, WRONG

from internimage_deploy.exporter.models import HeadConfig, SegmentorConfig
from internimage_deploy.exporter.rewrites import fusion
from internimage_deploy.exporter.rewrites.fusion import LowResolutionFusion
from support.small_models import FAMILIES


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Networks stay where they are; nothing is timed; the plugin's kernel runs on the host."""
    monkeypatch.setattr(networks, "DEVICE", "cpu")
    monkeypatch.setattr(networks, "DTYPE", "float32")
    monkeypatch.setattr(networks, "SIZE", (64, 96))
    monkeypatch.setattr(networks, "config", lambda: SegmentorConfig(FAMILIES["t"], HeadConfig("UPerHead", 32, 7)))
    monkeypatch.setattr(networks, "measure", lambda call: {"shape": tuple(getattr(call(), "shape", ()))})
    monkeypatch.setattr(fusion, "shifted_interpolation", fusion.shifted_interpolation)  # a stage replaces it for good
    monkeypatch.setattr(correctness, "enqueue", correctness.launch_on_host)
    yield
    networks.segmentor.cache_clear()


@pytest.mark.parametrize("form", networks.FORMS)
def test_a_form_of_the_head_equals_the_plain_one(form):
    row = networks.head(form, 2)
    assert row["status"] == OK
    assert row["error"] < 1e-4
    assert row["shape"] == (2, 7, 16, 24)


def test_the_forms_differ():
    counts = {
        form: sum(isinstance(m, LowResolutionFusion) for m in networks.segmentor(form).decode_head.children())
        for form in networks.FORMS
    }
    assert counts == {"plain": 0, "fusion rewritten": 1, "fusion and pooling rewritten": 2}


def test_what_is_measured_is_the_released_model(monkeypatch):
    monkeypatch.undo()
    shapes = [tuple(x.shape) for x in networks.features(2)]
    assert shapes == [(2, 64, 128, 128), (2, 128, 64, 64), (2, 256, 32, 32), (2, 512, 16, 16)]


def test_a_wrong_head_is_marked(monkeypatch):
    exact = networks.on_device

    def spoilt(module):
        moved = exact(module)
        moved.conv_seg.weight.data[0] += 1
        return moved

    monkeypatch.setattr(networks, "on_device", spoilt)
    assert networks.head("plain", 1)["status"] == WRONG


def test_the_backbone_with_the_plugin_kernel_equals_the_one_without():
    plain = networks.on_device(networks.segmentor("plain").backbone)
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = plain(images)
        # Offsets and mask are parts of one tensor there, and the mask holds logits.
        found = networks.with_plugin_kernel(plain)(images)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 1e-4

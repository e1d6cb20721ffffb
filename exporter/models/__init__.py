# SPDX-License-Identifier: Apache-2.0
"""InternImage and its segmentation heads in PyTorch, inference only."""

from internimage_deploy.exporter.models.config import BackboneConfig, HeadConfig, Mask2FormerConfig, SegmentorConfig
from internimage_deploy.exporter.models.dcnv3 import DCNv3, dcnv3
from internimage_deploy.exporter.models.ms_deform_attn import MSDeformAttention, ms_deform_attn
from internimage_deploy.exporter.models.segmentor import Segmentor, build_random, build_with, build_without_weights

__all__ = [
    "BackboneConfig",
    "DCNv3",
    "HeadConfig",
    "MSDeformAttention",
    "Mask2FormerConfig",
    "Segmentor",
    "SegmentorConfig",
    "build_random",
    "build_with",
    "build_without_weights",
    "dcnv3",
    "ms_deform_attn",
]

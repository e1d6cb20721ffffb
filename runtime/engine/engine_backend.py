# SPDX-License-Identifier: Apache-2.0
"""The two backends of engines: each library builds engines and runs those that it built."""

from __future__ import annotations

from typing import Literal

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]

ENGINE_BACKENDS: tuple[EngineBackend, ...] = ("tensorrt", "tensorrt-rtx")
DISPLAY_NAMES: dict[EngineBackend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
EXTRAS: dict[EngineBackend, str] = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
"""The extra of internimage-deploy that installs each."""

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
"""File name endings of engines."""

MsDeformAttnPlugin = Literal["own", "tensorrt"]
"""Who brings TensorRT's plugin for multi-scale deformable attention: this project, or TensorRT itself."""

FusionForm = Literal["plain", "rewritten"]
"""Form of UPerNet's fusion convolutions in an engine; see `plain_fusion`."""

Fusion = Literal["auto", "plain", "rewritten"]
"""The form to build; "auto" for the faster one where it can be timed."""

FUSIONS: tuple[Fusion, ...] = ("auto", "plain", "rewritten")

MS_DEFORM_ATTN_PLUGINS: tuple[MsDeformAttnPlugin, ...] = ("own", "tensorrt")

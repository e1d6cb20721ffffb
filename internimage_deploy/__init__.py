# SPDX-License-Identifier: Apache-2.0
"""InternImage (DCNv3) segmentation, from a PyTorch checkpoint to a running engine.

The rooms: `exporter` (PyTorch to ONNX), `trt_plugins` (the DCNv3 TensorRT plugin), `runtime` (pictures, engines,
serving). Importing this package loads none of them.
"""

from __future__ import annotations

from typing import Any

from internimage_deploy._version import __version__
from internimage_deploy.errors import MissingDependency, UserError

__all__ = ["MissingDependency", "Segmenter", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Segmenter":  # loaded on first use: it brings in OpenCV and a backend
        from internimage_deploy.runtime.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

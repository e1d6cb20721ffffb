# SPDX-License-Identifier: Apache-2.0
"""PyTorch to ONNX: model code, checkpoints, export, rewrites, verification. Never imports TensorRT or CUDA."""

from __future__ import annotations

from importlib.util import find_spec

from internimage_deploy.errors import MissingDependency


def require_packages() -> None:
    """Check for the packages that exporting needs and a runtime-only installation lacks.

    Raises:
        MissingDependency: PyTorch or onnxscript is not installed.
    """
    for package in ("torch", "onnxscript"):
        if find_spec(package) is None:
            raise MissingDependency(package, "export", "exporting a checkpoint")

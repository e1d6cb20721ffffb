# SPDX-License-Identifier: Apache-2.0
"""InternImage (DCNv3) segmentation, from a PyTorch checkpoint to a running engine.

Three steps, each a function or class here and a command of its own:

* `export`: a PyTorch checkpoint to a portable ONNX file (`export-onnx`);
* `build_engine`: that file to a TensorRT or TensorRT-RTX engine (`build-engine`);
* `Segmenter`: images to labels with either file (`internimage-deploy segment`).

`evaluate` scores either file against label maps (`internimage-deploy evaluate`).

What a user can get wrong raises `UserError`, whose message is one line. Importing this package loads none of the rooms
`exporter`, `trt_plugins` and `runtime`; each name loads what it needs on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from internimage_deploy._version import __version__
from internimage_deploy.errors import MissingDependency, UserError

if TYPE_CHECKING:
    from internimage_deploy.exporter.export import ExportedModel, export
    from internimage_deploy.runtime.engine.build import BuiltEngine, build_engine
    from internimage_deploy.runtime.evaluation.result import Evaluation
    from internimage_deploy.runtime.evaluation.run import evaluate
    from internimage_deploy.runtime.imaging.segmentation import Segmentation
    from internimage_deploy.runtime.segmenter import Segmenter
    from internimage_deploy.window import Window

__all__ = [
    "BuiltEngine",
    "Evaluation",
    "ExportedModel",
    "MissingDependency",
    "Segmentation",
    "Segmenter",
    "UserError",
    "Window",
    "__version__",
    "build_engine",
    "evaluate",
    "export",
]

_LAZY = {
    "BuiltEngine": "internimage_deploy.runtime.engine.build",
    "Evaluation": "internimage_deploy.runtime.evaluation.result",
    "ExportedModel": "internimage_deploy.exporter.export",
    "Segmentation": "internimage_deploy.runtime.imaging.segmentation",
    "Segmenter": "internimage_deploy.runtime.segmenter",
    "Window": "internimage_deploy.window",
    "build_engine": "internimage_deploy.runtime.engine.build",
    "evaluate": "internimage_deploy.runtime.evaluation.run",
    "export": "internimage_deploy.exporter.export",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

# SPDX-License-Identifier: Apache-2.0
"""How a model is loaded: one set of options for the API, the commands, the service and the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.imaging.pipeline import Resize, WindowChoice


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        backend: a name of `internimage_deploy.runtime.backends.registry.REGISTRY`, or "auto".
        threads: CPU threads of the network; None for all this process may use.
        resize: (long, short) in pixels to fit images into, keeping their ratio; "own" for no resizing; None for what
            the model card says. Only for models of free size, or with a window.
        window: None to give the network the whole image, "slide" for a sliding window of the network's fixed size, or
            a `Window`. Needs a model that returns logits.
        batch: maximum number of images (or crops) in one run of the network; a model of fixed batch ignores it.
        max_pixels: image files with more pixels are refused.
        trust_engine: let an engine run the code it carries, which version-compatible engines do.
        cuda_graphs: let engines record their launches and replay them.
    """

    backend: str = "auto"
    threads: int | None = None
    resize: Resize = None
    window: WindowChoice = None
    batch: int = 1
    max_pixels: int = MAX_PIXELS
    trust_engine: bool = False
    cuda_graphs: bool = True

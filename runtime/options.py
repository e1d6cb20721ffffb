# SPDX-License-Identifier: Apache-2.0
"""How a model is loaded: one set of options for the API, the commands, the service and the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.augmentation import Augmentation
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.imaging.pipeline import Resize, WindowChoice
from internimage_deploy.window import Window


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        backend: a name of `internimage_deploy.runtime.backends.registry.REGISTRY`, or "auto".
        threads: CPU threads of the network; None for all this process may use.
        resize: (long, short) in pixels to fit images into, keeping their ratio; "own" for no resizing; None for what
            the model card says. Only for models of free size, or with a window.
        window: None for what the model card says: a sliding window where the model was evaluated with one, else whole
            images. "whole" for whole images; "slide" for the card's window, or one of the network's fixed size where
            the card has none; or a `Window`. A network of fixed size slides in crops of that size, with the card's
            stride in proportion. Sliding needs logits, which every ONNX file of `export-onnx` can return.
        batch: maximum number of images (or crops) in one run of the network; a model of fixed batch ignores it.
        max_pixels: image files with more pixels are refused.
        trust_engine: let an engine run the code it carries, which version-compatible engines do.
        cuda_graphs: let engines record their launches and replay them.
        device: number of the GPU, as CUDA counts.
        scales: test-time augmentation: factors of the size that images are resized to, one run of the network each,
            whose class probabilities are averaged; () for the size alone. Needs logits, as the window does.
        flip: test-time augmentation: run every scale on the image's mirror image too.
    """

    backend: str = "auto"
    threads: int | None = None
    resize: Resize = None
    window: WindowChoice = None
    batch: int = 1
    max_pixels: int = MAX_PIXELS
    trust_engine: bool = False
    cuda_graphs: bool = True
    device: int = 0
    scales: tuple[float, ...] = ()
    flip: bool = False

    def __post_init__(self) -> None:
        """Refuse values of the wrong type or range. Raises `UserError`."""
        for name, value in (("threads", self.threads), ("batch", self.batch), ("max_pixels", self.max_pixels)):
            if value is None and name == "threads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}, expected a number of at least 1")
        if not isinstance(self.device, int) or isinstance(self.device, bool) or self.device < 0:
            raise UserError(f"device is {self.device!r}, expected the number of a GPU, from 0 on")
        if self.resize not in (None, "own") and not _is_size(self.resize):
            raise UserError(
                f'resize is {self.resize!r}, expected (long, short) in pixels such as (2048, 512), or "own"'
            )
        if self.window not in (None, "slide", "whole") and not isinstance(self.window, Window):
            raise UserError(f'window is {self.window!r}, expected "slide", "whole" or a Window(crop, stride)')
        _ = self.augmentation

    @property
    def augmentation(self) -> Augmentation | None:
        """`scales` and `flip`; None for one run on the image as it is. Raises `UserError` for values that are none."""
        return Augmentation(self.scales or (1.0,), self.flip) if self.scales or self.flip else None


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)

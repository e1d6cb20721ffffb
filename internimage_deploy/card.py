# SPDX-License-Identifier: Apache-2.0
"""The model card: everything the runtime must know about a model, carried inside the model's own file.

In an ONNX file it is JSON in `metadata_props` under the key `internimage_deploy`; beside an engine it is
`MODEL.engine.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError

METADATA_KEY = "internimage_deploy"
CARD_VERSION = 1

Array: TypeAlias = npt.NDArray[Any]
"""An input or output of a network; the model card says of which element type."""

# ImageNet statistics in RGB order on the 0..255 scale: what every released model was trained with.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def label_dtype(classes: int) -> type[np.uint8] | type[np.int32]:
    """The smallest of the two label types that holds `classes` ids."""
    return np.uint8 if classes <= 256 else np.int32


@dataclass(frozen=True)
class TensorSpec:
    """A network input or output.

    `shape` holds ints for fixed sizes and names ("batch", "height", "width") for free ones;
    `dtype` is NumPy's name for the element type.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine was built with, and what it needs to run."""

    backend: Literal["tensorrt", "tensorrt-rtx"]  # "flavour" in the JSON of a card
    version: str  # of the compiler
    sha256: str  # of the engine file
    compute_capabilities: tuple[str, ...]  # "8.6", ...; empty for the GPU it was built on
    profiles: tuple[dict[str, tuple[int, ...]], ...] = ()  # {"min"|"opt"|"max": (N, H, W)} each
    plugin_version: str = ""  # empty when the engine holds no plugin
    plugin_embedded: bool = False
    version_compatible: bool = False
    device: str = ""  # name of the GPU it was built on, when one was there


@dataclass(frozen=True)
class ModelCard:
    """Facts about a segmentation model, from its architecture to the picture it expects.

    `input` is either `image` (N, H, W, 3) uint8 RGB, or `input` (N, 3, H, W) float, normalised with `mean` and `std`
    (RGB, 0..255 scale). `output` is either `labels` (N, H, W) at network size, or `logits`
    (N, classes, H/4, W/4), to be upsampled bilinearly (half-pixel centres) before the argmax.
    """

    architecture: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB, one per class
    input: TensorSpec
    output: TensorSpec
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    color_order: Literal["rgb"] = "rgb"
    resize: tuple[int, int] | None = None  # (long, short) in pixels, keep-ratio; None = the picture's own size
    size_divisor: int = 32
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    kept_fp32: tuple[str, ...] = ()  # node names or operator types left in fp32 by a conversion
    rewrites: tuple[str, ...] = ()  # algebraic rewrites that were applied
    model: dict[str, Any] = field(default_factory=dict)  # backbone and head settings, for people and for `info`
    source: dict[str, str] = field(
        default_factory=dict
    )  # {"file": name without folders, "sha256": ...} or {"random": seed}
    tools: dict[str, str] = field(default_factory=dict)  # {"torch": "2.13.0", ...}
    engine: EngineInfo | None = None

    @property
    def takes_uint8(self) -> bool:
        """True when normalisation happens inside the graph."""
        return self.input.dtype == "uint8"

    @property
    def emits_labels(self) -> bool:
        """True when the network answers labels, False when it answers logits."""
        return self.output.name == "labels"

    @property
    def network_size(self) -> tuple[int | str, int | str]:
        """(height, width) of the input; ints where fixed, names where free."""
        shape = self.input.shape
        return (shape[1], shape[2]) if self.takes_uint8 else (shape[2], shape[3])

    @property
    def is_dynamic(self) -> bool:
        """True when height and width are free."""
        return isinstance(self.network_size[0], str)

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or None when it is free."""
        size = self.input.shape[0]
        return size if isinstance(size, int) else None

    def to_json(self) -> str:
        """The card as JSON text with its version, stable in order."""
        data = dataclasses.asdict(self)
        if data["engine"] is not None:
            data["engine"]["flavour"] = data["engine"].pop("backend")
        return json.dumps({"version": CARD_VERSION, **data}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str = "model card") -> ModelCard:
        """Read a card; `where` names the file in errors.

        Raises:
            UserError: the text is no card, or its version is one this program does not know.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where}: not a model card ({error}); export the model again") from error
        if version != CARD_VERSION:
            raise UserError(
                f"{where}: card version {version}, this program reads version {CARD_VERSION}; "
                "use the version of internimage-deploy that wrote it, or export the model again"
            )
        try:
            return _card(data)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: broken model card ({error}); export the model again") from error


def _card(data: dict[str, Any]) -> ModelCard:
    data = dict(data)
    for name in ("input", "output"):
        spec = data[name]
        data[name] = TensorSpec(str(spec["name"]), str(spec["dtype"]), tuple(spec["shape"]))
    for name in ("classes", "mean", "std", "kept_fp32", "rewrites"):
        if name in data:
            data[name] = tuple(data[name])
    data["palette"] = tuple((int(r), int(g), int(b)) for r, g, b in data["palette"])
    if data.get("resize") is not None:
        long, short = data["resize"]
        data["resize"] = (int(long), int(short))
    if data.get("engine") is not None:
        engine = dict(data["engine"])
        engine["backend"] = engine.pop("flavour")
        engine["compute_capabilities"] = tuple(engine["compute_capabilities"])
        engine["profiles"] = tuple(
            {bound: tuple(shape) for bound, shape in profile.items()} for profile in engine.get("profiles", ())
        )
        data["engine"] = EngineInfo(**engine)
    card = ModelCard(**data)
    if len(card.palette) != len(card.classes):
        raise ValueError(f"{len(card.classes)} classes but {len(card.palette)} colours")
    return card

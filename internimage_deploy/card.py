# SPDX-License-Identifier: Apache-2.0
"""The model card: the metadata that the runtime needs about a model, carried inside the model's own file.

In an ONNX file it is JSON in `metadata_props` under the key `internimage_deploy`; beside an engine it is
`MODEL.engine.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError

METADATA_KEY = "internimage_deploy"
CARD_VERSION = 1
MAX_SIDE = 16_384  # pixels of an image's side, for sizes and resize rules
COLOR_ORDER = "rgb"  # of every model so far; the file states it

Json = Any  # what json.loads returns

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
    """Metadata of an engine: what it was built with and needs to run."""

    backend: Literal["tensorrt", "tensorrt-rtx"]  # "flavour" in the JSON of a card
    version: str  # of the compiler
    sha256: str  # of the engine file
    compute_capabilities: tuple[str, ...]  # such as "8.6"; empty when it runs on the kind of GPU it was built on alone
    profiles: tuple[dict[str, tuple[int, ...]], ...] = ()  # one per profile: {"min"|"opt"|"max": (N, H, W)}
    plugin_version: str = ""  # empty when the engine holds no plugin
    plugin_embedded: bool = False
    version_compatible: bool = False
    device: str = ""  # name of the GPU it was built on, when one was there


@dataclass(frozen=True)
class ModelCard:
    """Metadata of a segmentation model, from its architecture to the image it expects.

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
    resize: tuple[int, int] | None = None  # (long, short) in pixels, aspect ratio kept; None: the image's own size
    size_divisor: int = 32  # a free height and width are multiples of it
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    kept_fp32: tuple[str, ...] = ()  # node names or operator types left in fp32 by a conversion
    rewrites: tuple[str, ...] = ()  # algebraic rewrites that were applied
    model: dict[str, dict[str, object]] = field(default_factory=dict)  # backbone and head settings, for `info`
    # {"file": name without folders, "sha256": ...} of the checkpoint, or {"random": seed}
    source: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)  # {"torch": "2.13.0", ...}
    engine: EngineInfo | None = None

    @property
    def takes_uint8(self) -> bool:
        """True when normalisation happens inside the graph."""
        return self.input.dtype == "uint8"

    @property
    def emits_labels(self) -> bool:
        """True when the network's output is labels, False when it is logits."""
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
        fields = {"version": CARD_VERSION, "color_order": COLOR_ORDER, **dataclasses.asdict(self)}
        if fields["engine"] is not None:
            fields["engine"]["flavour"] = fields["engine"].pop("backend")
        return json.dumps(fields, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str = "model card") -> ModelCard:
        """Read a card; `where` names the file in errors.

        Raises:
            UserError: the text is no card, its version is unknown to this program, or a field cannot be read.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where}: not a model card ({error}); export the model again") from error
        if version != CARD_VERSION:
            raise UserError(
                f"{where}: card version {version}, this program reads version {CARD_VERSION}; "
                "use the version of internimage-deploy that wrote it, or export the model again"
            )
        try:
            return _card(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: broken model card ({error}); export the model again") from error


def _card(fields: dict[str, Json]) -> ModelCard:
    if fields.pop("color_order", COLOR_ORDER) != COLOR_ORDER:
        raise ValueError(f"color_order: expected '{COLOR_ORDER}'")
    values: dict[str, Json] = {name: _READERS.get(name, _as_it_is)(value) for name, value in fields.items()}
    card = ModelCard(**values)
    if len(card.palette) != len(card.classes):
        raise ValueError(f"{len(card.classes)} classes but {len(card.palette)} colours")
    return card


def _tensor_spec(value: Json) -> TensorSpec:
    return TensorSpec(str(value["name"]), str(value["dtype"]), tuple(value["shape"]))


def _palette(value: Json) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(red), int(green), int(blue)) for red, green, blue in value)


def _resize(value: Json) -> tuple[int, int] | None:
    if value is None:
        return None
    long, short = value
    return int(long), int(short)


def _engine(value: Json) -> EngineInfo | None:
    if value is None:
        return None
    fields = dict(value)
    fields["backend"] = fields.pop("flavour")
    fields["compute_capabilities"] = tuple(fields["compute_capabilities"])
    profiles = fields.get("profiles", ())
    fields["profiles"] = tuple({bound: tuple(shape) for bound, shape in profile.items()} for profile in profiles)
    return EngineInfo(**fields)


def _as_it_is(value: Json) -> Json:
    return value


# What makes a field's value out of JSON's. Each may raise KeyError, TypeError or ValueError.
_READERS: dict[str, Callable[[Json], object]] = {
    "classes": tuple,
    "palette": _palette,
    "input": _tensor_spec,
    "output": _tensor_spec,
    "mean": tuple,
    "std": tuple,
    "resize": _resize,
    "kept_fp32": tuple,
    "rewrites": tuple,
    "engine": _engine,
}

# SPDX-License-Identifier: Apache-2.0
"""The model card: the metadata that the runtime needs about a model, carried inside the model's own file.

In an ONNX file it is JSON in `metadata_props` under the key `internimage_deploy`; beside an engine it is
`MODEL.engine.json`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError, is_plain_text, one_line, quoted
from internimage_deploy.window import Window

METADATA_KEY = "internimage_deploy"
CARD_VERSION = 1
MAX_SIDE = 16_384  # pixels of an image's side, for sizes and resize rules
MAX_ENTRIES = 65_536  # of a list in a card: classes, names of nodes
_MAX_CHARACTERS = 16_000_000  # of a card; one of a thousand classes has some 100,000
_MAX_TEXT = 1000
COLOR_ORDER = "rgb"  # of every model so far; the file states it

Json = Any  # what json.loads returns
Value = TypeVar("Value")

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
    plugin_file: str = ""  # name of the plugin library that lies beside the engine, empty for none
    plugin_sha256: str = ""  # of that library
    version_compatible: bool = False
    device: str = ""  # name of the GPU it was built on, when one was there
    profile_sharing: bool = False  # several execution contexts may use one optimisation profile at a time
    tf32: bool = False  # what runs in float32 may multiply with TF32's 10 bits of mantissa
    fusion: str = ""  # form of the decode head's fusion convolutions: "plain", "rewritten", or empty where it has none
    fusion_ms: dict[str, float] = field(default_factory=dict)  # {form: median time} where both forms were timed
    plugins: tuple[str, ...] = ()  # operators that plugins run, such as "DCNv3Packed"


@dataclass(frozen=True)
class ModelCard:
    """Metadata of a segmentation model, from its architecture to the image it expects.

    `input` is either `image` (N, H, W, 3) uint8 RGB, or `input` (N, 3, H, W) float, normalised with `mean` and `std`
    (RGB, 0..255 scale). `output` is either `labels` (N, H, W) at network size, or `logits`
    (N, classes, H/4, W/4), to be upsampled bilinearly (half-pixel centres) before the argmax. The `logits` of a
    Mask2Former are its semantic scores, between 0 and the number of queries; labels are made of them in the same way.
    """

    architecture: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB, one per class
    input: TensorSpec
    output: TensorSpec
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: tuple[int, int] | None = None  # (long, short) in pixels, aspect ratio kept; None: the image's own size
    window: Window | None = None  # that the model was evaluated with; None: on whole images
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
            if len(text) > _MAX_CHARACTERS:
                raise ValueError(f"{len(text):,} characters")
            fields = json.loads(text)
            version = fields.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: not a model card ({one_line(error)}); export the model again") from error
        if version != CARD_VERSION or isinstance(version, bool):
            raise UserError(
                f"{where}: card version {quoted(version)}, this program reads version {CARD_VERSION}; "
                "use the version of internimage-deploy that wrote it, or export the model again"
            )
        try:
            return _card(fields)
        except ValueError as error:
            raise UserError(f"{where}: broken model card ({one_line(error)}); export the model again") from error


def _card(fields: dict[str, Json]) -> ModelCard:
    if fields.pop("color_order", COLOR_ORDER) != COLOR_ORDER:
        raise ValueError(f"color_order: expected '{COLOR_ORDER}'")
    card = ModelCard(**_read_fields(fields, _READERS, _REQUIRED))
    if len(card.palette) != len(card.classes):
        raise ValueError(f"{len(card.classes)} classes but {len(card.palette)} colours")
    _check_shapes(card)
    return card


# Readers make a field's value out of JSON's. Each raises ValueError with what it got and expected.
Reader: TypeAlias = Callable[[Json], object]


def _read_fields(fields: Json, readers: dict[str, Reader], required: Collection[str]) -> dict[str, Any]:
    """The values of an object's fields, each by its reader."""
    if not isinstance(fields, dict):
        raise _unfit(fields, "an object")
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"'{missing[0]}' is missing")
    values = {}
    for name, value in fields.items():
        if name not in readers:
            raise ValueError(f"'{quoted(name)}' is no field of a card")
        try:
            values[name] = readers[name](value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return values


def _unfit(value: Json, expected: str) -> ValueError:
    return ValueError(f"got {quoted(value)}, expected {expected}")


def _text(value: Json) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not is_plain_text(value):
        raise _unfit(value, f"a text of up to {_MAX_TEXT} characters without control characters")
    return value


def _class_name(value: Json) -> str:
    """A name that is shown; a line break in it does no harm, other control characters do."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not is_plain_text(re.sub(r"[\n\t]", "", value)):
        raise _unfit(value, f"a text of up to {_MAX_TEXT} characters without control characters")
    return value


def _flag(value: Json) -> bool:
    if not isinstance(value, bool):
        raise _unfit(value, "true or false")
    return value


def _integer(low: int, high: int) -> Callable[[Json], int]:
    def read(value: Json) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _unfit(value, f"an integer from {low:,} to {high:,}")
        return value

    return read


def _number(low: float, high: float) -> Callable[[Json], float]:
    def read(value: Json) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is neither
            raise _unfit(value, f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def _one_of(*allowed: str) -> Reader:
    def read(value: Json) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _unfit(value, f"one of {', '.join(allowed)}")
        return value

    return read


def _optional(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _list_of(
    read: Callable[[Json], Value], low: int = 0, high: int = MAX_ENTRIES
) -> Callable[[Json], tuple[Value, ...]]:
    def read_list(value: Json) -> tuple[Value, ...]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise _unfit(value, f"a list of {low}" if low == high else f"a list of {low:,} to {high:,}")
        return tuple(map(read, value))

    return read_list


def _texts_by_name(value: Json) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise _unfit(value, "an object of texts")
    return {_text(name): _text(entry) for name, entry in value.items()}


def _settings(value: Json) -> dict[str, dict[str, object]]:
    """Backbone and head settings: nothing computes with them, but `info` prints them."""
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise _unfit(value, "an object of objects")
    return {_text(name): _flat_settings(section) for name, section in value.items()}


def _flat_settings(section: Json) -> dict[str, object]:
    if not isinstance(section, dict) or len(section) > MAX_ENTRIES:
        raise _unfit(section, "an object of numbers, texts and lists of them")
    return {
        _text(name): _list_of(_scalar)(value) if isinstance(value, list) else _scalar(value)
        for name, value in section.items()
    }


def _scalar(value: Json) -> object:
    if value is None or isinstance(value, bool):
        return value
    return _text(value) if isinstance(value, str) else _plain_number(value)


def _plain_number(value: Json) -> int | float:
    _number(-1e15, 1e15)(value)
    return cast("int | float", value)


def _side(value: Json) -> int | str:
    """A dimension: its size, or the name of a free one."""
    return _text(value) if isinstance(value, str) and value else _integer(1, 1_000_000)(value)


def _tensor_spec(names: tuple[str, ...]) -> Reader:
    readers = {"name": _one_of(*names), "dtype": _one_of(*_DTYPES), "shape": _list_of(_side, 3, 5)}
    return lambda value: TensorSpec(**_read_fields(value, readers, tuple(readers)))


def _sides(value: Json) -> tuple[int, ...]:
    return _list_of(_integer(1, MAX_SIDE), 2, 2)(value)


def _window(value: Json) -> Window:
    try:
        return Window(**_read_fields(value, {"crop": _sides, "stride": _sides}, ("crop", "stride")))
    except UserError as error:
        raise ValueError(str(error)) from error


def _profile(value: Json) -> dict[str, tuple[int, ...]]:
    size = _list_of(_integer(1, 1_000_000), 3, 3)
    profile = _read_fields(value, dict.fromkeys(("min", "opt", "max"), size), ("min", "opt", "max"))
    if not all(
        low <= opt <= high for low, opt, high in zip(*(profile[bound] for bound in ("min", "opt", "max")), strict=True)
    ):
        raise _unfit(value, "min, opt and max in this order")
    return profile


def _version(value: Json) -> str:
    if not isinstance(value, str) or re.fullmatch(r"[0-9]{1,9}(\.[0-9a-z+_-]{1,40}){0,9}", value) is None:
        raise _unfit(value, "a version such as 10.14.1")
    return value


def _file_name(value: Json) -> str:
    """A name without folders, so that a card leads to no file elsewhere."""
    name = _text(value)
    if re.search(r"[/\\]", name) or name in (".", ".."):
        raise _unfit(value, "a file name without folders")
    return name


def _milliseconds(value: Json) -> dict[str, float]:
    return _read_fields(value, dict.fromkeys(("plain", "rewritten"), _number(0, 1e9)), ())


def _engine(value: Json) -> EngineInfo:
    fields = _read_fields(value, _ENGINE_READERS, ("flavour", "version", "sha256", "compute_capabilities"))
    # Cards of before these keys: the compilers' own defaults were built with.
    shares_by_itself = fields["flavour"] == "tensorrt-rtx" or int(fields["version"].partition(".")[0]) >= 10
    fields = {"profile_sharing": shares_by_itself, "tf32": True, **fields}
    return EngineInfo(backend=fields.pop("flavour"), **fields)


def _check_shapes(card: ModelCard) -> None:
    """Check that input and output are of a form that the runtime knows; raises `ValueError`."""
    shape, out = card.input.shape, card.output.shape
    channels = 3 if card.takes_uint8 else 1
    if len(shape) != 4 or shape[channels] != 3:
        raise ValueError(
            f"input: got the shape {quoted(shape)}, expected {'(N, H, W, 3)' if card.takes_uint8 else '(N, 3, H, W)'}"
        )
    height, width = card.network_size
    if isinstance(height, int) != isinstance(width, int):
        raise ValueError(f"input: got the size {quoted((height, width))}, expected two numbers or two names")
    if card.emits_labels and (len(out) != 3 or card.output.dtype not in ("uint8", "int32", "int64")):
        raise ValueError(f"output: got {card.output.dtype} {quoted(out)}, expected integers (N, H, W)")
    if isinstance(height, int) and isinstance(width, int) and max(height, width) > MAX_SIDE:
        raise ValueError(f"input: got the size {height}x{width}, expected at most {MAX_SIDE:,} pixels")
    if card.window is not None and any(side % card.size_divisor for side in card.window.crop):
        raise ValueError(f"window: got crops of {card.window.crop}, expected multiples of {card.size_divisor}")


_DTYPES = ("uint8", "int32", "int64", "float32", "float16")
_ENGINE_READERS: dict[str, Reader] = {
    "flavour": _one_of("tensorrt", "tensorrt-rtx"),
    "version": _version,
    "sha256": _text,
    "compute_capabilities": _list_of(_text, high=64),
    "profiles": _list_of(_profile, high=64),
    "plugin_version": _text,
    "plugin_embedded": _flag,
    "plugin_file": _file_name,
    "plugin_sha256": _text,
    "version_compatible": _flag,
    "device": _text,
    "profile_sharing": _flag,
    "tf32": _flag,
    "fusion": _one_of("", "plain", "rewritten"),
    "fusion_ms": _milliseconds,
    "plugins": _list_of(_text, high=64),
}
_REQUIRED = ("architecture", "classes", "palette", "input", "output")
_READERS: dict[str, Reader] = {
    "architecture": _text,
    "classes": _list_of(_class_name, low=1),
    "palette": _list_of(_list_of(_integer(0, 255), 3, 3)),
    "input": _tensor_spec(("image", "input")),
    "output": _tensor_spec(("labels", "logits")),
    "mean": _list_of(_number(-1e6, 1e6), 3, 3),
    "std": _list_of(_number(1e-300, 1e6), 3, 3),
    "resize": _optional(_sides),
    "window": _optional(_window),
    "size_divisor": _integer(1, 1024),
    "precision": _one_of("fp32", "fp16", "bf16"),
    "kept_fp32": _list_of(_text),
    "rewrites": _list_of(_text),
    "model": _settings,
    "source": _texts_by_name,
    "tools": _texts_by_name,
    "engine": _optional(_engine),
}

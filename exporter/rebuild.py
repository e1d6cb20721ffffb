# SPDX-License-Identifier: Apache-2.0
"""The constructors that a checkpoint's pickle may call: tensors, plain containers, and NumPy's scalars and arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from internimage_deploy.exporter.denied import is_denied
from internimage_deploy.exporter.pickle_literals import Damaged
from internimage_deploy.exporter.unpickler import Constructor, Global, Inert, Refused, checked_key, checked_keys

_MAX_DIMENSIONS = 32
_MAX_EXTENT = 1 << 62
_MAX_IDENTIFIER = 16  # entries of a persistent id
_MAX_METHOD = 500  # characters of a method's name with its class; a chain of names would grow without end
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_PLAIN_DTYPE = re.compile(r"[<>=|]?(?:[?]|b1|[iu][1248]|f[248]|c8|c16)")


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A run of numbers that lies outside the pickle, under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose numbers are not read yet; strides and offset in elements of `dtype`."""

    storage: StorageRef
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class NumpyDtype:
    """An element type of NumPy; None until it is known, or where it is no plain number."""

    def __init__(self, value: np.dtype[np.generic] | None) -> None:
        self.value = value

    def build(self, state: object) -> None:
        """Take over the byte order, the one part of the state that a plain number has."""
        plain = isinstance(state, tuple) and len(state) >= 3 and state[2:5] in ((None,) * 3, (None,) * 2, (None,))
        if self.value is None or not isinstance(state, tuple) or not plain or state[1] not in ("<", ">", "=", "|"):
            self.value = None
        else:
            self.value = self.value.newbyteorder(state[1])

    def finished(self) -> object:
        """Itself: scalars and arrays need it."""
        return self


class NumpyArray:
    """An array of NumPy; None until its state comes, or where its elements are no plain numbers."""

    def __init__(self) -> None:
        self.value: npt.NDArray[np.generic] | None = None

    def build(self, state: object) -> None:
        """Take over (version, shape, dtype, is_fortran, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise Damaged("an array in it is damaged")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")

    def finished(self) -> object:
        """The array; a stand-in where it could not be built."""
        return Inert("numpy.ndarray") if self.value is None else self.value


def storage_reference(identifier: object) -> object:
    """What a persistent id, ("storage", type, key, device, number of elements), refers to. Raises `Damaged`."""
    match identifier if isinstance(identifier, tuple) and len(identifier) <= _MAX_IDENTIFIER else None:
        case ("module", Global(name=name), *_):  # a module of a whole model, saved with its source
            return Inert(name)
        case ("storage", Global(name=name), str(key), _, int(numel), *view):
            dtype = _STORAGE_TYPES.get(name.rpartition(".")[2])
            if dtype is not None and name.startswith("torch.") and 0 <= numel < _MAX_EXTENT and view in ([], [None]):
                return StorageRef(key, dtype, numel)
    raise Damaged("it refers to its weights in a form that this program does not know")


def constructors(text_budget: int) -> Mapping[str, Constructor]:
    """The constructors by the names that pickles use.

    Args:
        text_budget: number of characters that may be turned into bytes in all; the text is in the pickle once, but a
            hostile one could have it turned into bytes any number of times. Elements of lists that become sets and
            dictionaries count as characters: as few as they take in an honest pickle.
    """
    left = text_budget

    def encode(text: object, encoding: object = "latin1") -> object:
        nonlocal left
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            return Inert("_codecs.encode", (text, encoding))
        left -= len(text)
        if left < 0:
            raise Damaged("it repeats one text too often")
        return text.encode("latin1")

    def take(items: list[object] | tuple[object, ...], each: int) -> None:
        nonlocal left
        left -= each * len(items)
        if left < 0:
            raise Damaged("it repeats one list too often")

    def sequence_of(kind: type[set[object]] | type[frozenset[object]]) -> Constructor:
        def build(items: object = ()) -> object:
            if not isinstance(items, list | tuple):
                return Inert(kind.__name__, (items,))
            take(items, 64)
            return kind(checked_keys(items))

        return build

    def mapping(pairs: object = (), *_: object) -> object:
        """A dictionary; of a `defaultdict` the factory is forgotten."""
        result: dict[object, object] = {}
        if isinstance(pairs, list):
            take(pairs, 4)
            for key, value in pairs:
                result[checked_key(key, len(result))] = value
        return result

    return {
        "_codecs.encode": encode,
        **{f"{module}.set": sequence_of(set) for module in ("builtins", "__builtin__")},
        **{f"{module}.frozenset": sequence_of(frozenset) for module in ("builtins", "__builtin__")},
        "collections.OrderedDict": mapping,
        "collections.defaultdict": mapping,
        **_CONSTRUCTORS,
    }


def _tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> object:
    sizes_fit = all(
        isinstance(sizes, tuple)
        and len(sizes) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < _MAX_EXTENT for size in sizes)
        for sizes in (shape, stride, (offset,))
    )
    if not isinstance(storage, StorageRef) or not sizes_fit or len(shape) != len(stride):  # type: ignore[arg-type]
        raise Damaged("a tensor in it is damaged")
    if len(rest) > 2 and rest[2]:  # such as "this is the negative of what is stored"
        return Inert("torch.Tensor with a lazy operation")
    return StoredTensor(storage, storage.dtype, shape, stride, offset)  # type: ignore[arg-type]


def _parameter(data: object, *_: object) -> object:
    return data if isinstance(data, StoredTensor) else Inert("torch.nn.Parameter", (data,))


def _tensor_of_a_subclass(function: object, kind: object, arguments: object, *_: object) -> object:
    """A tensor with attributes of its own, which are dropped."""
    if isinstance(function, Global) and isinstance(arguments, tuple) and function.name in _TENSORS:
        return _TENSORS[function.name](*arguments)
    return Inert("torch.Tensor of another class", (function, kind, arguments))


def _shape(sizes: object = ()) -> object:
    return sizes if isinstance(sizes, tuple) else Inert("torch.Size", (sizes,))


def _dtype(code: object, *_: object) -> NumpyDtype:
    plain = isinstance(code, str) and _PLAIN_DTYPE.fullmatch(code)
    return NumpyDtype(np.dtype(code) if plain else None)  # type: ignore[call-overload]


def _scalar(dtype: object, data: object = None) -> object:
    array = _array(data, dtype, (1,), "C")
    return Inert("numpy scalar", (dtype, data)) if array is None else array[0]


def _reconstruct(kind: object, *_: object) -> object:
    if isinstance(kind, Global) and kind.name == "numpy.ndarray":
        return NumpyArray()
    return Inert(kind.name if isinstance(kind, Global) else "numpy.ndarray")


def _from_buffer(data: object, dtype: object, shape: object, order: object = "C") -> object:
    array = _array(data, dtype, shape, order)
    return Inert("numpy.ndarray") if array is None else array


def _array(data: object, dtype: object, shape: object, order: object) -> npt.NDArray[np.generic] | None:
    """An array over `data`, without a copy; None where its elements are no plain numbers. Raises `Damaged`."""
    if not isinstance(dtype, NumpyDtype) or dtype.value is None or not isinstance(data, bytes | bytearray):
        return None
    sizes = shape if isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS else (-1,)
    fits = all(type(size) is int and 0 <= size < _MAX_EXTENT for size in sizes) and order in ("C", "F")
    if not fits or math.prod(sizes) * dtype.value.itemsize != len(data):
        raise Damaged("an array in it is damaged")
    array: npt.NDArray[np.generic] = np.frombuffer(data, dtype.value).reshape(sizes, order=order)  # type: ignore[call-overload]
    return array


def _attribute(owner: object = None, attribute: object = None, *rest: object) -> object:
    """The name of a method: `getattr(HistoryBuffer, "min")` is how protocol 2 writes those in mmengine's logs.

    Anything but a public attribute of a class is refused, since a chain of those may end at any function. A class is
    recognised by its capital letter, as nothing is imported.
    """
    if isinstance(owner, Global) and isinstance(attribute, str) and not rest:
        of_a_class = owner.name.rpartition(".")[2][:1].isupper()
        plain = attribute.isidentifier() and not attribute.startswith("_")
        if (
            of_a_class
            and plain
            and len(owner.name) + len(attribute) <= _MAX_METHOD
            and not is_denied(owner.name, attribute)
        ):
            return Global(f"{owner.name}.{attribute}")
    raise Refused("builtins.getattr")


def _no_bytes(*arguments: object) -> object:
    """Empty bytes, which old pickles write as a call without arguments."""
    return Inert("bytes", arguments) if arguments else b""


_TENSORS: dict[str, Constructor] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
_NUMPY = ("numpy.core.", "numpy._core.")
_CONSTRUCTORS: dict[str, Constructor] = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_a_subclass,
    "torch.Size": _shape,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "builtins.getattr": _attribute,
    "__builtin__.getattr": _attribute,
    "numpy.dtype": _dtype,
    **{f"{package}multiarray.scalar": _scalar for package in _NUMPY},
    **{f"{package}multiarray._reconstruct": _reconstruct for package in _NUMPY},
    **{f"{package}numeric._frombuffer": _from_buffer for package in _NUMPY},
}

KNOWN = frozenset(
    ["numpy.ndarray", "torch.storage.UntypedStorage", "torch.nn.parameter.Parameter", "torch.Tensor"]
    + [f"{module}.{name}" for module in ("torch", "torch.cuda") for name in _STORAGE_TYPES]
    + [f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
)
"""Names that pickles of tensors use as arguments."""

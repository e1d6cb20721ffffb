# SPDX-License-Identifier: Apache-2.0
"""Opening a checkpoint file: zip (PyTorch 1.6 and later), the format before it, a plain pickle, or safetensors.

The file is mapped and its tensors are read where they lie, so that optimiser states and training-only tensors cost
nothing and weights no memory beyond the file's own pages.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from internimage_deploy.errors import UserError
from internimage_deploy.exporter import rebuild, safetensors
from internimage_deploy.exporter.pickle_literals import Damaged
from internimage_deploy.exporter.rebuild import StorageRef, StoredTensor
from internimage_deploy.exporter.unpickler import Refused, Unpickler
from internimage_deploy.files import is_address, kind_of_file

_HEAD = 1024  # bytes that show what a file is
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file from before PyTorch 1.6
_PROTOCOL = 1001  # second
_ZIP_HEADER = struct.Struct("<4s22xHH")  # signature, and lengths of the name and the extra field behind it


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        value: its one object, with `StoredTensor` for tensors and `Inert` for objects of unknown classes.
        inert: how often each unknown class or function occurs, by name.
        file: reads the tensors.
    """

    value: object
    inert: Counter[str]
    file: TensorFile


class TensorFile:
    """A mapped file, and where in it each storage lies."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.locations: dict[str, tuple[int, int]] = {}  # first byte and number of bytes by the storage's key

    def tensor(self, stored: StoredTensor) -> Tensor:
        """`stored` as a tensor over the mapped file; a copy where it lies at an address that its type cannot have.

        Raises:
            Damaged: it claims more than the file holds.
        """
        start, size = self.locations.get(stored.storage.key, (0, 0))
        numel, item = math.prod(stored.shape), stored.dtype.itemsize
        if not numel:
            return torch.empty(stored.shape, dtype=stored.dtype)
        steps = zip(stored.shape, stored.stride, strict=True)
        last = stored.offset + sum((extent - 1) * step for extent, step in steps)
        if (last + 1) * item > size or numel * item > size:
            raise Damaged(f"claims shape {stored.shape} but stores less")
        begin, count = start + stored.offset * item, last + 1 - stored.offset
        if begin % item:
            flat = torch.frombuffer(bytearray(self._data[begin : begin + count * item]), dtype=stored.dtype)
        else:
            flat = torch.frombuffer(self._data, dtype=stored.dtype, count=count, offset=begin)
        return flat.as_strided(stored.shape, stored.stride)


def read_content(path: Path) -> Content:
    """Read what is in the checkpoint `path`, without executing anything.

    Raises:
        UserError: the file cannot be read, is no checkpoint, or asks for code that no training run stores.
    """
    if not path.exists():
        first = "download it first and " if is_address(path) else ""
        raise UserError(f"{path} does not exist; {first}give the path of a checkpoint (.pth)")
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; give the path of a checkpoint (.pth)")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
            if not _is_checkpoint(head, size):
                raise UserError(
                    f"{path} is not a readable PyTorch checkpoint: it is {kind_of_file(head)}; give the path of a "
                    ".pth or .safetensors file, or download it again"
                )
            # Private and writable, as PyTorch wants its memory; nothing writes to it.
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return _read(data, head)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    except MemoryError as error:
        raise UserError(f"{path} cannot be read: not enough memory") from error
    except Refused as refused:
        raise UserError(
            f"{path} is refused: it asks for '{refused}', which can run code and which no training run stores; "
            "nothing of it was run, do not open the file with another program, get the checkpoint from its author"
        ) from refused
    except Damaged as damaged:
        raise UserError(
            f"{path} is not a readable PyTorch checkpoint ({damaged}); it may be truncated: download or save it again"
        ) from damaged


def _is_checkpoint(head: bytes, size: int) -> bool:
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\1", b"\2", b"\3", b"\4", b"\5")
    return is_pickle or head.startswith(b"PK\3\4") or safetensors.is_safetensors(head, size)


def _read(data: mmap.mmap, head: bytes) -> Content:
    file = TensorFile(data)
    if head.startswith(b"PK"):
        return _read_zip(data, file)
    if head.startswith(b"\x80"):
        return _read_pickles(data, file)
    value, file.locations = safetensors.read_header(data)
    return Content(value, Counter(), file)


def _read_zip(data: mmap.mmap, file: TensorFile) -> Content:
    records = _zip_records(data)
    (pickled, *others) = [name for name in records if name.endswith("/data.pkl")] or [""]
    folder = pickled.rpartition("/")[0]
    if not pickled or others:
        raise Damaged("it is a zip archive that holds no 'data.pkl'")
    if f"{folder}/byteorder" in records:
        start, size = records[f"{folder}/byteorder"]
        if data[start : start + min(size, 16)] != b"little":
            raise Damaged("it was written on a big-endian machine")
    start, size = records[pickled]
    unpickler = _unpickler(data, start, start + size)
    value = unpickler.load()
    prefix = f"{folder}/data/"
    file.locations = {name.removeprefix(prefix): at for name, at in records.items() if name.startswith(prefix)}
    return Content(value, unpickler.unknown, file)


def _zip_records(data: mmap.mmap) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of each file in the archive. Raises `Damaged`."""
    records = {}
    try:
        with zipfile.ZipFile(cast(IO[bytes], data)) as archive:  # a map has a file's methods
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise Damaged("it is a TorchScript program, save the model's state_dict instead")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise Damaged("it was compressed or encrypted again after training: unpack the original")
            signature, *lengths = _ZIP_HEADER.unpack_from(data, entry.header_offset)
            start = entry.header_offset + _ZIP_HEADER.size + sum(lengths)
            if signature != b"PK\3\4" or start + entry.file_size > len(data):
                raise Damaged("a part of the zip archive is missing")
            records[entry.filename] = (start, entry.file_size)
    except Damaged:
        raise
    except Exception as error:  # a damaged archive makes `zipfile` fail in many ways
        raise Damaged("it is a damaged zip archive") from error
    return records


def _read_pickles(data: mmap.mmap, file: TensorFile) -> Content:
    """A file from before PyTorch 1.6: five pickles, then the storages, each behind its length; or a plain pickle."""
    first = _unpickler(data, 0)
    value = first.load()
    if not isinstance(value, int) or value != _MAGIC:  # an array would compare its elements
        return Content(value, first.unknown, file)
    position, values = first.position, []
    storages: dict[str, StorageRef] = {}
    unknown: Counter[str] = Counter()
    for _ in range(4):
        unpickler = _unpickler(data, position, storages=storages)
        values.append(unpickler.load())
        position = unpickler.position
        unknown += unpickler.unknown
    protocol, system, value, keys = values
    little = isinstance(system, dict) and system.get("little_endian") is True
    known = isinstance(protocol, int) and protocol == _PROTOCOL
    if not known or not little or not isinstance(keys, list):
        raise Damaged("it is of an unknown version, or was written on a big-endian machine")
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or position + 8 > len(data):
            raise Damaged("its weights end early")
        size = int.from_bytes(data[position : position + 8], "little", signed=True) * storage.dtype.itemsize
        position += 8
        if not 0 <= size <= len(data) - position:
            raise Damaged("its weights end early")
        file.locations[storage.key] = (position, size)
        position += size
    return Content(value, unknown, file)


def _unpickler(
    data: mmap.mmap, start: int, end: int | None = None, storages: dict[str, StorageRef] | None = None
) -> Unpickler:
    def refer(identifier: object) -> object:
        found = rebuild.storage_reference(identifier)
        if storages is not None and isinstance(found, StorageRef):
            storages[found.key] = found
        return found

    size = (len(data) if end is None else end) - start
    return Unpickler(data, start, end, constructors=rebuild.constructors(size), known=rebuild.KNOWN, persistent=refer)

# SPDX-License-Identifier: Apache-2.0
"""Where images come from and results go: a folder, or a prefix of an object store such as `s3://bucket/images`."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.files import atomic_write, make_folder
from internimage_deploy.runtime.imaging.fetch import without_credentials

if TYPE_CHECKING:
    from pyarrow import fs


@dataclass(frozen=True)
class Location:
    """A folder's path, or the address of a prefix; plain data that any machine of a cluster can open."""

    uri: str

    def __str__(self) -> str:
        return without_credentials(self.uri)

    @property
    def is_address(self) -> bool:
        """True for a prefix of an object store."""
        return "://" in self.uri

    def open(self) -> Storage:
        """Connect to it. Raises `UserError`."""
        return ObjectStore(self) if self.is_address else Folder(Path(self.uri))


class Storage(ABC):
    """An opened location; paths are relative to it, with "/" between folders."""

    @abstractmethod
    def list(self, *, recursive: bool) -> list[str]:
        """Paths of the files, sorted; none where the location does not exist. Raises `UserError`."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The content of a file. Raises `UserError`."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file so that it is seen whole or not at all. Raises `UserError`."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file, which must exist. Raises `UserError`."""


class Folder(Storage):
    """A folder of this machine, or of a disk that several machines share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self, *, recursive: bool) -> list[str]:
        try:
            paths = sorted(self.root.rglob("*") if recursive else self.root.iterdir())
            return [path.relative_to(self.root).as_posix() for path in paths if path.is_file()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot list {self.root}: {error.strerror}") from error

    def read(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / path}: {error.strerror or error}") from error

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        make_folder(target.parent)
        atomic_write(target, data)

    def delete(self, path: str) -> None:
        try:
            (self.root / path).unlink()
        except OSError as error:
            raise UserError(f"cannot delete {self.root / path}: {error.strerror or error}") from error


class ObjectStore(Storage):
    """A prefix of an object store, through Arrow's file systems."""

    def __init__(self, location: Location) -> None:
        try:
            from pyarrow import ArrowInvalid, fs
        except ImportError as error:
            raise MissingDependency("pyarrow", "ray", f"opening {location}") from error
        self._location = location
        try:
            self._system: fs.FileSystem
            self._system, self._root = fs.FileSystem.from_uri(location.uri)
        except (ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"{location}: not a location that can be opened ({last_line(error)})") from error

    def list(self, *, recursive: bool) -> list[str]:
        from pyarrow import fs

        selector = fs.FileSelector(self._root, recursive=recursive, allow_not_found=True)
        try:
            infos = self._system.get_file_info(selector)
        except OSError as error:
            raise UserError(f"cannot list {self._location}: {last_line(error)}") from error
        return sorted(posixpath.relpath(info.path, self._root) for info in infos if info.type == fs.FileType.File)

    def read(self, path: str) -> bytes:
        try:
            with self._system.open_input_stream(posixpath.join(self._root, path)) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise UserError(f"{self._location}/{path}: {last_line(error)}") from error

    def write(self, path: str, data: bytes) -> None:
        if self._system.type_name == "local":  # file://...: a folder all the same
            Folder(Path(self._root)).write(path, data)
            return
        try:
            # Object stores show an object when it is complete.
            with self._system.open_output_stream(posixpath.join(self._root, path)) as stream:
                stream.write(data)
        except OSError as error:
            raise UserError(f"cannot write {self._location}/{path}: {last_line(error)}") from error

    def delete(self, path: str) -> None:
        try:
            self._system.delete_file(posixpath.join(self._root, path))
        except OSError as error:
            raise UserError(f"cannot delete {self._location}/{path}: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """What a library's many-lined exception says last, where Arrow and Ray put the reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

# SPDX-License-Identifier: Apache-2.0
"""Writing files atomically: a reader sees the old file, the new file or none, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internimage_deploy.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "its folder is not a folder; choose another path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EFBIG: "the file is too large for this file system or its limits",
}


def _process_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


# Read once: reading it means setting it for a moment, and other threads write files in that moment.
_UMASK = _process_umask()
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_file(path: Path, what: str = "a file") -> None:
    """Check that `path` is a file; `what` says in the message what was expected, as "a model file".

    Raises:
        UserError: there is nothing at `path`, or it is a folder.
    """
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name that no file system takes
        raise UserError(f"{str(path)[:80]}: {error.strerror or error}") from error
    if not is_file:
        address = "no such file; a web address? download the file first" if is_address(path) else "no such file"
        raise UserError(f"{path}: {f'is a folder, not {what}' if is_folder else address}")


def is_address(path: Path) -> bool:
    """True for a web address that was taken for a path, which has lost one of its slashes."""
    return not {"http:", "https:"}.isdisjoint(path.parts)


# What a file is by its first bytes: its name may be another kind's, as of a web page saved as model.pth.
_KINDS = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip file, unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive, unpack it first"),
    (b"Rar!", "a RAR archive, unpack it first"),
    (b"\xfd7zXZ", "an xz file, unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file, unpack it first"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x7fELF", "a program or library"),
    (b"ftrt", "a TensorRT engine"),
    (b"version https://git-lfs", "a Git LFS pointer, fetch the file itself with  git lfs pull"),
)
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def kind_of_file(head: bytes) -> str:
    """What a file is, by its first bytes, as "a PNG image"; "of an unknown kind" where they show nothing."""
    if not head:
        return "empty"
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    text = head.lstrip().lower()
    if text.startswith(_HTML):
        return "a web page (HTML): the download got a page, not the file"
    # The first two fields of an ONNX file: its version, and the producer's name or the graph.
    if head[:1] == b"\x08" and 3 <= head[1] <= 30 and head[2:3] in (b"\x12", b"\x3a"):
        return "an ONNX model"
    if head[257:262] == b"ustar":
        return "a tar archive, unpack it first"
    try:
        start = head[:-4].decode() if len(head) > 8 else head.decode()  # the last character may be cut
    except UnicodeDecodeError:
        return "of an unknown kind"
    if start[:1] in "{[":
        return "a JSON text"
    return "a text" if start.isprintable() or (set(start) & set("\n\t") and "\0" not in start) else "of an unknown kind"


def write_error(path: Path, error: OSError) -> UserError:
    """The `UserError` that explains why `path` could not be written."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    if error.errno == errno.ENOENT and path.absolute().parent.is_dir():  # it is the file system that refuses
        reason = "no file can be made there; choose another path"
    return UserError(f"cannot write {path}: {reason}")


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, unless they exist. Raises `UserError` if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"cannot write into {folder}: it is a file, expected a folder") from error
    except OSError as error:
        if error.errno == errno.ENOENT:  # its parents are made too, so it is the file system that refuses
            raise UserError(f"cannot write {folder}: no folder can be made there; choose another path") from error
        raise write_error(folder, error) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that `make_folder` could not make, without making it. Raises `UserError`."""
    place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not place.is_dir():
        raise UserError(f"cannot write into {folder}: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK):
        raise write_error(folder, OSError(errno.EACCES, ""))


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, moved into place file by file on success and removed on failure.

    Write `target.name` and any companions (external data) into the folder that is yielded. On leaving normally each
    file is renamed next to `target`, `target` itself last, so that whoever sees `target` sees its companions too.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
        OSError: the body raised it about another file.
    """
    target = target.absolute()
    if target.is_dir():
        raise write_error(target, OSError(errno.EISDIR, ""))
    # The name is known before the folder is made, so that an interrupt in between cannot leave it behind.
    stage = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    try:
        with _explained(target):
            stage.mkdir(mode=0o700)
        try:
            yield stage
        except OSError as error:
            # The body may open other files too; only an error about the stage is one about `target`.
            if error.errno in _OUT_OF_SPACE or _lies_in(error.filename, stage):
                raise write_error(target, error) from error
            raise
        with _explained(target):
            for path in sorted(stage.iterdir(), key=lambda p: p.name == target.name):
                _adopt_umask(path)
                os.replace(path, target.parent / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """The path of a temporary file that becomes `target` on leaving normally.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    with staging_folder(target) as stage:
        yield stage / target.name


def atomic_write(target: Path, data: bytes | str) -> None:
    """Write `data` to `target` in one step; str is encoded as UTF-8. Raises `UserError` if it cannot be written."""
    with atomic_path(target) as path:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal text; raises `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(target, error) from error


def _lies_in(name: object, folder: Path) -> bool:
    return isinstance(name, str | bytes | os.PathLike) and Path(os.fsdecode(name)).is_relative_to(folder)


def _adopt_umask(path: Path) -> None:
    """Set the permissions that a plain open() would have set; a private temporary folder's are narrower."""
    os.chmod(path, 0o666 & ~_UMASK)

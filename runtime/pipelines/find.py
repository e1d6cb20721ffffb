# SPDX-License-Identifier: Apache-2.0
"""Which images and videos a run segments, and what their results are named."""

from __future__ import annotations

import dataclasses
import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.fetch import address_stem, is_web_address, without_credentials
from internimage_deploy.runtime.imaging.image_io import EXTENSIONS
from internimage_deploy.runtime.imaging.results import is_result
from internimage_deploy.runtime.pipelines.storage import Location
from internimage_deploy.runtime.pipelines.video import VIDEO_EXTENSIONS, is_video, video_stem

STDIN = "-"
"""Names the standard input, which then holds one image file."""

# Image formats that Pillow's wheels do not read everywhere; they are named rather than passed over in silence.
_UNREAD = {
    ".avif": "AVIF",
    ".heic": "HEIC",
    ".heif": "HEIF",
    ".jp2": "JPEG 2000",
    ".j2k": "JPEG 2000",
    ".jxl": "JPEG XL",
    ".dng": "raw",
    ".svg": "SVG",
}


@dataclass(frozen=True)
class ImageFile:
    """An image to segment.

    Attributes:
        location: the folder or prefix that it lies in; empty for a web address and for the standard input.
        path: relative to `location`, a web address, or `STDIN`.
        stem: path of the results, relative to the output, without their endings.
    """

    location: Location
    path: str
    stem: str

    def __str__(self) -> str:
        if not self.location.uri:
            return "standard input" if self.path == STDIN else without_credentials(self.path)
        if self.location.is_address:
            return f"{self.location}/{self.path}"
        return str(Path(self.location.uri) / self.path)

    def absolute(self) -> ImageFile:
        """The same file, named so that another process finds it."""
        if self.location.is_address or not self.location.uri:
            return self
        return dataclasses.replace(self, location=Location(str(Path(self.location.uri).absolute())))

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.path).name if self.location.uri else str(self)


@dataclass(frozen=True)
class VideoFile:
    """A video file, camera, stream or pipeline, see `is_video`; `stem` as in `ImageFile`."""

    source: str
    stem: str
    found: bool = False  # by searching a folder, rather than named

    def __str__(self) -> str:
        return without_credentials(self.source)


Item = TypeVar("Item", ImageFile, VideoFile)


@dataclass
class Inputs:
    """What a run segments.

    Attributes:
        images: image files, addresses and the standard input.
        videos: video files and streams.
        unread: files of image formats that are not read, as "file (format)".
        missing: (file, reason) of inputs that were named and do not exist.
        renamed: files whose results have the ending or the folder in their name, as another file has the same stem.
    """

    images: list[ImageFile] = field(default_factory=list)
    videos: list[VideoFile] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    renamed: list[ImageFile | VideoFile] = field(default_factory=list)


def find_inputs(names: Sequence[str], *, recursive: bool = False, streams: bool = False) -> Inputs:
    """The images and videos that `names` stand for.

    Args:
        names: files, folders, object store prefixes, patterns such as "day*/*.png", web addresses, "-" for the standard
            input, and text files with a name in each line (relative to the text file's folder).
        recursive: search folders and prefixes to any depth.
        streams: web addresses are videos.

    A search leaves out hidden files and results of this program. A file that is named twice is segmented once.

    Raises:
        UserError: nothing to segment, or two images whose results would have the same name.
    """
    found = Inputs()
    seen: set[str] = set()
    for name in _expanded(names):
        try:
            _find(name, found, seen, recursive=recursive, streams=streams)
        except (OSError, ValueError) as error:  # a name that is too long for the file system, an address that is none
            found.missing.append((name[:80], getattr(error, "strerror", None) or str(error)))
    if not found.images and not found.videos:
        if found.missing:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in found.missing))
        if found.unread:
            raise UserError(f"{found.unread[0]}: this format is not read; convert it to PNG or JPEG first")
    _part_equal_stems(found)
    return found


def _find(name: str, found: Inputs, seen: set[str], *, recursive: bool, streams: bool) -> None:
    """Add what one name stands for."""
    if name == STDIN:
        _add(found, seen, ImageFile(Location(""), STDIN, "stdin"))
    elif is_video(name, web=streams) and not _is_other_file(name):
        _add(found, seen, VideoFile(name, video_stem(name)))
    elif is_web_address(name):
        _add(found, seen, ImageFile(Location(""), name, address_stem(name)))
    elif Location(name).is_address or Path(name).is_dir():
        _search(Location(name), recursive, found, seen)
    elif Path(name).is_file():
        path = Path(name)
        _add(found, seen, ImageFile(Location(str(path.parent)), path.name, path.stem))
    else:
        found.missing.append((name, "no such file"))


def _is_other_file(name: str) -> bool:
    """True for a folder or file whose name looks like a stream's or pipeline's: what exists is what it is."""
    path = Path(name)
    return "://" not in name and path.exists() and (path.is_dir() or path.suffix.lower() not in VIDEO_EXTENSIONS)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the file system
        return False


def _expanded(names: Sequence[str]) -> Iterator[str]:
    """`names` with patterns and text files replaced by what they stand for."""
    for name in names:
        path = Path(name)
        if path.suffix.lower() == ".txt" and _exists(path):
            yield from _listed(path)
        elif glob.has_magic(name) and "://" not in name and " ! " not in name and not _exists(path):
            every = sorted(glob.glob(name, recursive=True))
            matches = [match for match in every if not is_result(match)]
            if not matches:
                what = "only results of this program match" if every else "no file matches"
                raise UserError(f"{name}: {what} this pattern")
            yield from matches
        else:
            yield name


def _listed(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of files ({error})") from error
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise UserError(f"{path}: an empty list, expected the name of an image in each line")
    for entry in entries:
        yield entry if "://" in entry else str(path.parent / entry)


def _search(place: Location, recursive: bool, found: Inputs, seen: set[str]) -> None:
    before = len(found.images) + len(found.videos) + len(found.unread)
    results = 0
    for path in place.open().list(recursive=recursive):
        pure = PurePosixPath(path)
        ending = pure.suffix.lower()
        if pure.name.startswith(".") or is_result(pure.name):
            results += is_result(pure.name)
            continue
        if ending in EXTENSIONS:
            _add(found, seen, ImageFile(place, path, str(pure.with_suffix(""))))
        elif ending in VIDEO_EXTENSIONS and not place.is_address and not pure.name.endswith(".overlay.mp4"):
            _add(found, seen, VideoFile(str(Path(place.uri) / path), str(pure.with_suffix("")), found=True))
        elif ending in _UNREAD:
            found.unread.append(f"{ImageFile(place, path, '')} ({_UNREAD[ending]})")
    if len(found.images) + len(found.videos) + len(found.unread) == before:
        deeper = "" if recursive else "; add --recursive to search its subfolders"
        beside = " beside results of this program" if results else ""
        raise UserError(f"{place}: no image here{beside} ({', '.join(sorted(EXTENSIONS))}){deeper}")


def _add(found: Inputs, seen: set[str], item: ImageFile | VideoFile) -> None:
    name = item.source if isinstance(item, VideoFile) else str(item)
    key = name if "://" in name or " ! " in name or name.isdigit() else str(Path(name).resolve())
    if key in seen:
        return
    seen.add(key)
    if isinstance(item, VideoFile):
        found.videos.append(item)
    else:
        found.images.append(item)


def _part_equal_stems(found: Inputs) -> None:
    """Part files whose results would have one name, by the file's ending or else by the folder; refuse what is left."""
    found.images, renamed_images = _parted(found.images)
    found.videos, renamed_videos = _parted(found.videos)
    found.renamed = [*renamed_images, *renamed_videos]


def _parted(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """`items` with stems of their own, and those of them that were renamed."""
    by_stem: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        by_stem.setdefault(item.stem, []).append(index)
    parted, renamed = list(items), []
    for indices in by_stem.values():
        if len(indices) == 1:
            continue
        for index, stem in zip(indices, _distinct_stems([items[index] for index in indices]), strict=True):
            parted[index] = dataclasses.replace(items[index], stem=stem)
            renamed.append(parted[index])
    owners: dict[str, Item] = {}
    for item in parted:
        first = owners.setdefault(item.stem, item)
        if first is not item:
            raise UserError(
                f"{first} and {item} would both write {item.stem}.*; rename one, or segment them into different folders"
            )
    return parted, renamed


def _distinct_stems(items: Sequence[ImageFile | VideoFile]) -> list[str]:
    """Names for the results of `items`, which have one stem: with the ending, with the folder, or with both."""
    paths = [_full_path(item) for item in items]
    endings = [item.stem + path.suffix for item, path in zip(items, paths, strict=True)]
    folders = [f"{path.parent.name or 'root'}/{item.stem}" for item, path in zip(items, paths, strict=True)]
    both = [folder + path.suffix for folder, path in zip(folders, paths, strict=True)]
    return next((stems for stems in (endings, folders) if len(set(stems)) == len(stems)), both)


def _full_path(item: ImageFile | VideoFile) -> PurePosixPath:
    """Where `item` lies, with the real name of its folder: "street.jpg" and "../street.jpg" alone do not show it.

    A folder called "" or ".." in the name of a result would lead out of the output.
    """
    name = str(item)
    if "://" in name:
        host, _, path = name.partition("://")[2].partition("/")
        return PurePosixPath("/" + host + posixpath.normpath("/" + path))
    return PurePosixPath(Path(os.path.abspath(name)).as_posix())

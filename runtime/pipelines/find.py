# SPDX-License-Identifier: Apache-2.0
"""Which images a run segments, and what their results are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import EXTENSIONS
from internimage_deploy.runtime.imaging.results import LABELS, is_result
from internimage_deploy.runtime.pipelines.storage import Location


@dataclass(frozen=True)
class ImageFile:
    """An image to segment.

    Attributes:
        location: the folder or prefix that it lies in.
        path: relative to `location`.
        stem: path of the results, relative to the output, without their endings.
    """

    location: Location
    path: str
    stem: str

    def __str__(self) -> str:
        if self.location.is_address:
            return f"{self.location}/{self.path}"
        return str(Path(self.location.uri) / self.path)

    def absolute(self) -> ImageFile:
        """The same file, named so that another process finds it."""
        if self.location.is_address:
            return self
        return ImageFile(Location(str(Path(self.location.uri).absolute())), self.path, self.stem)

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePosixPath(self.path).name


def find_images(inputs: Sequence[Location], *, recursive: bool = False) -> list[ImageFile]:
    """The images in `inputs`: image files, and folders or prefixes to be searched.

    A search leaves out hidden files and results of this program. A file that is named twice is segmented once.

    Raises:
        UserError: a folder without images, or two images whose results would have the same name.
    """
    found: dict[str, ImageFile] = {}
    for place in inputs:
        file = Path(place.uri)
        if place.is_address or file.is_dir():
            images = _search(place, recursive)
        else:
            images = [ImageFile(Location(str(file.parent)), file.name, file.stem)]
        for image in images:
            found.setdefault(str(image) if place.is_address else str(Path(str(image)).resolve()), image)
    owners: dict[str, ImageFile] = {}
    for image in found.values():
        first = owners.setdefault(image.stem, image)
        if first is not image:
            raise UserError(
                f"{first} and {image} would both write {image.stem}{LABELS}; "
                "rename one, or segment them into different folders"
            )
    return list(found.values())


def _search(place: Location, recursive: bool) -> list[ImageFile]:
    images = []
    for path in place.open().list(recursive=recursive):
        pure = PurePosixPath(path)
        if pure.suffix.lower() in EXTENSIONS and not pure.name.startswith(".") and not is_result(pure.name):
            images.append(ImageFile(place, path, str(pure.with_suffix(""))))
    if not images:
        deeper = "" if recursive else "; add --recursive to search its subfolders"
        raise UserError(f"{place}: no image here ({', '.join(sorted(EXTENSIONS))}){deeper}")
    return images

# SPDX-License-Identifier: Apache-2.0
"""Images from files: whatever the encoding, the result is (H, W, 3) uint8 RGB, upright."""

from __future__ import annotations

import io
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError, one_line
from internimage_deploy.files import require_file
from internimage_deploy.runtime.imaging.fetch import fetch, is_web_address
from internimage_deploy.runtime.imaging.scan import Structure, check_structure

if TYPE_CHECKING:
    from typing import Protocol

    from PIL import Image

    class SupportsArray(Protocol):
        """An array or tensor of another library: PyTorch, JAX, CuPy on the CPU."""

        def __array__(self, dtype: Any = None, /) -> npt.NDArray[Any]: ...


ImageSource = Union[str, Path, bytes, npt.NDArray[np.uint8], "Image.Image", "SupportsArray"]
"""What `load_image` takes."""

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused unless the caller raises the limit: a small file can hold a huge image."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})
"""File name endings taken for images when a folder is searched."""

# Pillow knows formats that start other programs (EPS: Ghostscript); only plain raster formats are opened.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM")

_STRIP_PIXELS = 1 << 18
_PILLOW_LIMIT = 89_478_485  # Pillow's own, as it is set when nobody has changed it
_pillow_limit_lock = threading.Lock()
_pillow_limit_lifted = False


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    EXIF rotation is applied, alpha is dropped, grey is repeated into three channels, palettes and CMYK become RGB,
    16-bit values keep their upper byte (as OpenCV does), and of an animation the first frame counts.

    Args:
        path: the file.
        max_pixels: refuse images with more pixels than this before they are decoded.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: no such file, no image, a damaged image, or one above the limit.
    """
    path = Path(path)
    require_file(path, "an image")
    with opened(path, str(path)) as (image, _):
        return _to_array(image, str(path), max_pixels)


def decode_image(
    data: bytes, *, what: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = _FORMATS
) -> npt.NDArray[np.uint8]:
    """As `read_image`, for the bytes of an image file; `what` names them in errors, `formats` narrows what is read."""
    with opened(data, what, formats) as (image, _):
        return _to_array(image, what, max_pixels)


@contextmanager
def opened(
    source: Path | bytes | bytearray, name: str, formats: tuple[str, ...] = _FORMATS
) -> Iterator[tuple[Image.Image, Structure]]:
    """An image file, opened once and not decoded, and its structure, which has been checked.

    Raises:
        UserError: no image, a damaged one, or one of excessive structure; also for what Pillow raises in the block.
    """
    with _damage_as_user_error(name), ExitStack() as stack:
        if isinstance(source, Path):
            file: BinaryIO = stack.enter_context(source.open("rb"))
            structure = _structure_of(file, name)
        else:
            file = io.BytesIO(source)
            structure = check_structure(source, name)
        yield stack.enter_context(_open(file, name, formats, structure)), structure


def rgb_strips(image: Image.Image, name: str) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(first row, (h, W, 3) uint8 RGB) of a decoded image, a few rows at a time, so that no second copy is needed.

    Raises:
        UserError: before the first strip; the values have more than 16 bits.
    """
    if image.mode == "F":
        raise UserError(f"{name}: floating-point pixels, expected 8 or 16 bits; convert the image first")
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 0xFFFF:  # type: ignore[operator]
            raise UserError(f"{name}: 32-bit grey values, expected 8 or 16 bits; convert the image first")
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, _rgb(image.crop((0, top, image.width, min(top + rows, image.height))))


def lift_pillow_limit() -> None:
    """Switch Pillow's own limit of pixels off in this process, for a process that checks sizes itself."""
    global _pillow_limit_lifted
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    _pillow_limit_lifted = True


def upright(image: Image.Image) -> None:
    """Turn `image` as its EXIF block says, in place; it stays as it is stored where that block is damaged."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # a cut block gives struct.error, a false one something else; the pixels are good all the same
        return


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Any image that a caller may hold as an array.

    Args:
        source: a path; an http or https address; an image file's content; a PIL image; an array or CPU tensor (H, W, 3)
            or, as torchvision has it, (3, H, W), uint8 RGB.
        max_pixels: images with more pixels are refused before they are decoded.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: none of these, or not readable.
    """
    from PIL import Image

    if isinstance(source, str) and is_web_address(source):
        return decode_image(fetch(source), what=source, max_pixels=max_pixels)
    if isinstance(source, (str, Path)):
        return read_image(source, max_pixels=max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), max_pixels=max_pixels)
    if hasattr(source, "read"):  # an open file
        return decode_image(source.read(), max_pixels=max_pixels)
    if isinstance(source, Image.Image):
        with _damage_as_user_error("image"):
            _check_pixels(source, "image", max_pixels)
            return _to_array(source.copy(), "image", max_pixels)  # the caller's stays as it is
    return check_array(source)


def check_array(image: Any, what: str = "image") -> npt.NDArray[np.uint8]:
    """`image` as an array (H, W, 3) uint8; `UserError` if it is none, is empty, or has another type or shape."""
    if not isinstance(image, np.ndarray):
        if not hasattr(image, "__array__"):
            raise UserError(
                f"{what}: got {type(image).__name__}, expected a path, an address, a PIL image, the bytes of an image "
                "file, or an (H, W, 3) uint8 RGB array"
            )
        try:
            image = np.asarray(image)
        except (TypeError, RuntimeError, ValueError) as error:  # a tensor on a GPU, or one that needs gradients
            raise UserError(f"{what}: this {type(image).__name__} does not become an array ({error})") from error
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = np.ascontiguousarray(image.transpose(1, 2, 0))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"{what}: got {image.dtype} {image.shape}, expected uint8 (H, W, 3) in RGB order")
    checked: npt.NDArray[np.uint8] = image
    return checked


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UserError(
            f"{name}: {image.width}x{image.height} is {image.width * image.height:,} pixels, the limit is "
            f"{max_pixels:,}; raise it with --max-pixels (max_pixels=) if you trust this file"
        )


def _to_array(image: Image.Image, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    _check_pixels(image, name, max_pixels)
    image.load()
    upright(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in rgb_strips(image, name):
        pixels[top : top + len(strip)] = strip
    return pixels


@contextmanager
def _damage_as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this image") from error
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions for damaged files
        raise UserError(f"{name}: cannot be read as an image ({one_line(error)})") from error


def _structure_of(file: BinaryIO, name: str) -> Structure:
    """The structure of a file on disk, which is not read as a whole."""
    if not os.fstat(file.fileno()).st_size:
        return Structure()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return check_structure(data, name)


def _open(file: BinaryIO, name: str, formats: tuple[str, ...], structure: Structure) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    pixels = structure.width * structure.height
    small = 0 < pixels <= min(Image.MAX_IMAGE_PIXELS or _PILLOW_LIMIT, _PILLOW_LIMIT)
    try:
        with nullcontext() if small or _pillow_limit_lifted else _own_pixel_limit():
            return Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a known format ({', '.join(formats)})") from error


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow uses 32-bit integers for some of it
        grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Pillow's own limit is global, not per file: lift it while opening; ours is checked next, before decoding."""
    from PIL import Image

    with _pillow_limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before

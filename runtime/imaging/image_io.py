# SPDX-License-Identifier: Apache-2.0
"""Images from files: whatever the encoding, the result is (H, W, 3) uint8 RGB, upright."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.fetch import fetch, is_web_address

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

_pillow_limit_lock = threading.Lock()


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
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    return _read(path, str(path), max_pixels, _FORMATS)


def decode_image(
    data: bytes, *, what: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = _FORMATS
) -> npt.NDArray[np.uint8]:
    """As `read_image`, for the bytes of an image file; `what` names them in errors, `formats` narrows what is read."""
    return _read(io.BytesIO(data), what, max_pixels, formats)


def image_size(data: bytes, *, what: str = "image", formats: tuple[str, ...] = _FORMATS) -> tuple[int, int]:
    """(width, height) as the header of an image file says, however large; nothing is decoded.

    Raises:
        UserError: no image, or a damaged header.
    """
    with _damage_as_user_error(what), _open(io.BytesIO(data), what, formats) as image:
        return image.width, image.height


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
    if isinstance(source, Image.Image):
        with _damage_as_user_error("image"):
            return _to_array(source, "image", max_pixels)
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


def _read(source: Path | io.BytesIO, name: str, max_pixels: int, formats: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    with _damage_as_user_error(name), _open(source, name, formats) as image:
        return _to_array(image, name, max_pixels)


def _to_array(image: Image.Image, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    if image.width * image.height > max_pixels:
        raise UserError(
            f"{name}: {image.width}x{image.height} is {image.width * image.height:,} pixels, the limit is "
            f"{max_pixels:,}; raise it with --max-pixels (max_pixels=) if you trust this file"
        )
    image.load()
    rgb = _to_rgb(_upright(image), name)
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8))


@contextmanager
def _damage_as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this image") from error
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions for damaged files
        raise UserError(f"{name}: cannot be read as an image ({_one_line(error)})") from error


def _open(source: Path | io.BytesIO, name: str, formats: tuple[str, ...]) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with _own_pixel_limit():
            return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a known format ({', '.join(formats)})") from error


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF block says; as it is stored where that block is damaged."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a cut block gives struct.error, a false one something else; the pixels are good all the same
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image | npt.NDArray[np.uint8]:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow uses 32-bit integers for some of it
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"{name}: 32-bit grey values, expected 8 or 16 bits; convert the image first")
        return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(f"{name}: floating-point pixels, expected 8 or 16 bits; convert the image first")
    return image.convert("RGB")


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

# SPDX-License-Identifier: Apache-2.0
"""The process that decodes the images of clients, so that one which takes too long or crashes it can be ended.

It reads requests from its standard input and writes to its standard output; see `REQUEST` and `REPLY`. It imports as
little as it can, and ends with its input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging import image_io
from internimage_deploy.runtime.serving.execution.memory import return_freed_memory

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What clients may send: the formats of browsers and cameras, and none whose decoder is rarely used elsewhere."""

REQUEST = struct.Struct("<QQQd")
"""Bytes of the image file that follows; most pixels it may have; bytes that decoding may take; seconds it may take."""
REPLY = struct.Struct("<BQQ")
"""`PIXELS`, height and width, then the rows of RGB; or `ERROR`, the length of its text and 0, then the text."""
PIXELS, ERROR = 1, 2

_NICENESS = 2  # as the workers'
_BASE_MEMORY = 64 << 20  # what decoders need beside pixels: tables, metadata, the interpreter's own
_MAX_TEXT = 16 << 20  # of PNG text chunks, decompressed; Pillow's default is 64 MiB


def main() -> None:
    """Decode images until the input ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # for the parent, which closes the input when its work is done
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    return_freed_memory()
    _prepare_pillow()
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not get between the pixels
    while (header := read_exactly(requests, REQUEST.size)) is not None:
        size, max_pixels, memory, seconds = REQUEST.unpack(header)
        data = read_exactly(requests, size)
        if data is None:
            return
        with _time_limit(seconds), _memory_limit(memory):
            _decode(data, max_pixels, replies)
        del data


def read_exactly(stream: BinaryIO, size: int) -> bytearray | None:
    """`size` bytes of a stream; None if it ends before."""
    data = bytearray(size)
    view = memoryview(data)
    position = 0
    while position < size:
        read = stream.readinto(view[position:])  # type: ignore[attr-defined]
        if not read:
            return None
        position += read
    return data


def write_all(stream: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write everything to an unbuffered stream, which may take less at once."""
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) :]


def _prepare_pillow() -> None:
    from PIL import Image, PngImagePlugin

    image_io.lift_pillow_limit()  # sizes are checked here
    Image.init()
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT


def _decode(data: bytearray, max_pixels: int, replies: BinaryIO) -> None:
    started = False
    try:
        with image_io.opened(data, "the image", FORMATS) as (image, _):
            if image.width * image.height > max_pixels:
                raise UserError("the image: cannot be read as an image (it is larger than its header says)")
            image.load()
            image_io.upright(image)
            for top, strip in image_io.rgb_strips(image, "the image"):
                if top == 0:
                    started = True
                    write_all(replies, REPLY.pack(PIXELS, image.height, image.width))
                write_all(replies, strip.data)
    except UserError as error:
        if started:  # the parent counts on pixels that will not come
            os._exit(1)
        text = str(error).encode()
        write_all(replies, REPLY.pack(ERROR, len(text), 0) + text)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End this process when the time is up, even if the parent is gone and Pillow does not return."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Let allocations of more than `size` bytes fail, as far as the system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + size + _BASE_MEMORY
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

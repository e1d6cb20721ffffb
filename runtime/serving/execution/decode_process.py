# SPDX-License-Identifier: Apache-2.0
"""The process that reads the images and large JSON bodies of clients, so that it can be ended when that takes too long.

It reads requests from its standard input and writes to its standard output; see `REQUEST` and `REPLY`. It imports as
little as it can, and ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging import image_io
from internimage_deploy.runtime.serving.execution.memory import return_freed_memory
from internimage_deploy.runtime.serving.http import inference_protocol
from internimage_deploy.runtime.serving.http_error import HttpError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What clients may send: the formats of browsers and cameras, and none whose decoder is rarely used elsewhere."""

REQUEST = struct.Struct("<BQQQdd")
"""`IMAGE` or `TENSOR`; bytes that follow; most pixels; bytes of memory, seconds, and seconds of CPU time (0: any) that
the work may take. This process ends when it takes more time, and by `CPU_SIGNAL` if it was CPU time.

After `IMAGE` follows an image file, after `TENSOR` a line of JSON, the arguments of `inference_protocol.read_request`,
and the body of a request.
"""
REPLY = struct.Struct("<BQQ")
"""`IMAGE`, height, width, then the rows of RGB; or `TENSOR`, the bytes of a JSON header and of a tensor, then both; or
`ERROR`, the bytes of a JSON header and 0, then that."""
IMAGE, TENSOR, ERROR = 1, 2, 3
CPU_SIGNAL = getattr(signal, "SIGPROF", None)  # not on Windows

_NICENESS = 2  # as the workers'
_BASE_MEMORY = 128 << 20  # what decoders need beside pixels: tables, metadata, the interpreter's own
_MAX_TEXT = 16 << 20  # of PNG text chunks, decompressed; Pillow's default is 64 MiB


def main() -> None:
    """Decode images until the input ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # for the parent, which closes the input when its work is done
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    return_freed_memory()
    # What libraries say about a file is the file's choice, and could fill the service's log.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    _prepare_pillow()
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not get between the pixels
    while (header := read_exactly(requests, REQUEST.size)) is not None:
        kind, size, max_pixels, memory, seconds, cpu_seconds = REQUEST.unpack(header)
        data = read_exactly(requests, size)
        if data is None:
            return
        with _time_limit(seconds, cpu_seconds), _memory_limit(memory):
            if kind == IMAGE:
                _decode(data, max_pixels, replies)
            else:
                _read_tensor(data, replies)
        del data


def read_exactly(stream: IO[bytes], size: int) -> bytearray | None:
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


def write_all(stream: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write everything to an unbuffered stream, which may take less at once."""
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) :]


def _prepare_pillow() -> None:
    from PIL import Image, PngImagePlugin

    image_io.lift_pillow_limit()  # sizes are checked here
    Image.init()
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT


def _decode(data: bytearray, max_pixels: int, replies: IO[bytes]) -> None:
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
                    write_all(replies, REPLY.pack(IMAGE, image.height, image.width))
                write_all(replies, strip.data)
    except UserError as error:
        if started:  # the parent counts on pixels that will not come
            os._exit(1)
        _send_error(HttpError(400, str(error), kind="picture"), replies)


def _read_tensor(data: bytearray, replies: IO[bytes]) -> None:
    end = data.index(b"\n")
    arguments = json.loads(data[:end])
    del data[: end + 1]
    try:
        request = inference_protocol.read_request(data, **arguments)
    except MemoryError:
        _send_error(HttpError(413, "the request needs more memory than this service allows", kind="size"), replies)
    except HttpError as error:
        _send_error(error, replies)
    else:
        fields = {"id": request.id, "binary": request.binary, "shape": request.image.shape}
        header = json.dumps(fields).encode()
        write_all(replies, REPLY.pack(TENSOR, len(header), request.image.nbytes) + header)
        write_all(replies, request.image.data)


def _send_error(error: HttpError, replies: IO[bytes]) -> None:
    header = json.dumps({"status": error.status, "reason": error.reason, "kind": error.kind}).encode()
    write_all(replies, REPLY.pack(ERROR, len(header), 0) + header)


@contextlib.contextmanager
def _time_limit(seconds: float, cpu_seconds: float) -> Iterator[None]:
    """End this process when the time is up, even if the parent is gone and Pillow does not return."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
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

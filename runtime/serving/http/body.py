# SPDX-License-Identifier: Apache-2.0
"""Reading request bodies within limits of size, time and memory, and never to disk."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.settings import Limits

_MAX_FIELDS = 20  # form fields beside the files
_PARSED_AT_ONCE = 256 << 10
# Of a form, in bytes; browsers send 70. Parameters of many semicolons take quadratic time to read.
_LONGEST_CONTENT_TYPE = 1000
# Of fields and of files' names. Starlette takes any that Python has; `punycode` takes quadratic time.
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1", b"latin-1", b"latin1"})
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong with a form is told to its sender
# The last is what `curl --data-binary` sends by default.
_RAW_TYPES = ("application/octet-stream", "image/", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class Upload:
    """An image file as it was sent; `name` is the client's name for it and never used as a path."""

    name: str
    data: bytes | bytearray


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, without its temporary files: bodies are bounded before they get here."""

    spool_max_size = 1 << 40


async def read_body(request: Request, share: Share, limits: Limits) -> bytearray:
    """The whole body, decompressed if it came compressed.

    Raises:
        HttpError: 400 (not what its headers say), 408 (too slow), 413 (too large), 415 (unknown coding), 503 (memory).
    """
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdecimal() and int(announced) > limits.body:
        raise _too_large(limits)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "deflate"):
        raise HttpError(415, f"Content-Encoding {coding[:40]!r}; expected gzip, deflate or none", kind="type")
    body = bytearray()
    try:
        await _receive(request, body, share, limits)
    except BaseException:
        body.clear()  # at once: the exception's traceback may keep it alive, when its share is given back already
        raise
    if coding in ("gzip", "deflate"):
        return await asyncio.to_thread(_decompress, body, coding, share, limits)
    return body


async def _receive(request: Request, body: bytearray, share: Share, limits: Limits) -> None:
    """Append what the client sends to `body`. Raises `HttpError` as `read_body` says."""
    deadline = time.monotonic() + limits.body_s
    chunks = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks, None), max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError as error:
            late = f"the body did not arrive in {limits.body_s:g} s"
            raise HttpError(408, late, kind="slow", headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise HttpError(400, "the client went away", kind="gone") from error
        if chunk is None:
            break
        if len(body) + len(chunk) > limits.body:
            raise _too_large(limits)
        share.take(len(chunk))
        body += chunk


async def read_uploads(request: Request, body: bytearray, share: Share, limits: Limits) -> list[Upload]:
    """The image files in a body: one for a raw body, each file of a form, which takes memory twice more.

    Raises:
        HttpError: 400 (broken or empty form), 413 (too many files), 415 (neither an image nor a form).
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        if len(content_type) > _LONGEST_CONTENT_TYPE:
            raise HttpError(400, f"the Content-Type is longer than {_LONGEST_CONTENT_TYPE} bytes", kind="form")
        share.take(2 * len(body))
        return await _form_files(request.headers, body, limits)
    if media_type and not media_type.startswith(_RAW_TYPES):
        raise HttpError(
            415,
            f"Content-Type {media_type[:80]!r}; expected image/*, application/octet-stream or multipart/form-data",
            kind="type",
        )
    if not body:
        raise HttpError(400, "the body is empty; expected an image", kind="picture")
    return [Upload("", body)]


async def _form_files(headers: Headers, body: bytearray, limits: Limits) -> list[Upload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PARSED_AT_ONCE):
            yield bytes(body[start : start + _PARSED_AT_ONCE])
            await asyncio.sleep(0)  # other requests have their turn

    charset = parse_options_header(headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise HttpError(400, f"charset {charset[:40].decode('latin-1')!r} of the form; expected UTF-8", kind="form")
    try:
        parser = _InMemoryParser(
            headers, stream(), max_files=limits.batch_images, max_fields=_MAX_FIELDS, max_part_size=1 << 16
        )
        form = await parser.parse()
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [Upload(_clean(file.filename), await file.read()) for file in files]
        await form.close()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise HttpError(413, f"more than {limits.batch_images} images in one request", kind="size") from error
        raise HttpError(400, f"broken form: {error.message}", kind="form") from error
    except (FormParserError, KeyError, ValueError, LookupError) as error:
        raise HttpError(400, f"broken form: {_clean(str(error))}", kind="form") from error
    if not uploads:
        raise HttpError(400, "the form holds no file; send the image as a file field", kind="form")
    return uploads


def _decompress(body: bytearray, coding: str, share: Share, limits: Limits) -> bytearray:
    """`body` decompressed in steps, so that a small body cannot become a large one before it is noticed."""
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS)
    out = bytearray()
    remaining: bytes | bytearray = body
    try:
        while remaining and not decompressor.eof:
            piece = decompressor.decompress(remaining, 1 << 20)
            if len(out) + len(piece) > limits.body:
                raise _too_large(limits)
            share.take(len(piece))
            out += piece
            remaining = decompressor.unconsumed_tail
    except zlib.error as error:
        raise HttpError(400, f"the body is not {coding}: {error}", kind="form") from error
    if not decompressor.eof:
        raise HttpError(400, f"the {coding} body ends too early", kind="form")
    return out


def _too_large(limits: Limits) -> HttpError:
    return HttpError(
        413, f"the body is larger than {limits.body:,} bytes", kind="size", headers={"Connection": "close"}
    )


def _clean(text: str | None) -> str:
    """A client's text, shortened to 200 characters and without what cannot be printed."""
    return "".join(c for c in (text or "")[:200] if c.isprintable())

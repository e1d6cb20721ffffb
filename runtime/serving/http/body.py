# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body: never more than allowed, never longer than allowed, never to disk."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.settings import Limits

_FIELDS = 20  # form fields beside the files
# The last is what `curl --data-binary` says unless told otherwise.
_RAW_TYPES = ("application/octet-stream", "image/", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class Upload:
    """A picture as it was sent; `name` is the client's word for it and never a path of ours."""

    name: str
    data: bytes


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, without its temporary files: bodies are bounded before they get here."""

    spool_max_size = 1 << 40


async def read_body(request: Request, share: Share, limits: Limits) -> bytes:
    """The whole body, decompressed if it came compressed.

    Refuses with 400 (not what its headers say), 408 (too slow), 413 (too large), 415 (unknown coding), 503 (memory).
    """
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdecimal() and int(announced) > limits.body:
        raise _too_large(limits)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "deflate"):
        raise Refusal(415, f"Content-Encoding {coding[:40]!r}; expected gzip, deflate or none", kind="type")
    body = bytearray()
    deadline = time.monotonic() + limits.body_s
    chunks = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks, None), max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError as error:
            late = f"the body did not arrive in {limits.body_s:g} s"
            raise Refusal(408, late, kind="slow", headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise Refusal(400, "the client went away", kind="gone") from error
        if chunk is None:
            break
        if len(body) + len(chunk) > limits.body:
            raise _too_large(limits)
        share.take(len(chunk))
        body += chunk
    if coding in ("gzip", "deflate"):
        return _decompress(bytes(body), coding, share, limits)
    return bytes(body)


async def read_uploads(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    """The pictures in a body: one for a raw body, each file of a form.

    Refuses with 400 (broken or empty form), 413 (too many files), 415 (neither a picture nor a form).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form_files(request.headers, body, limits)
    if kind and not kind.startswith(_RAW_TYPES):
        raise Refusal(
            415, f"Content-Type {kind[:80]!r}; expected image/*, application/octet-stream or multipart/form-data",
            kind="type",
        )  # fmt: skip
    if not body:
        raise Refusal(400, "the body is empty; expected a picture", kind="picture")
    return [Upload("", body)]


async def _form_files(headers: Headers, body: bytes, limits: Limits) -> list[Upload]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    most = limits.batch_pictures
    try:
        parser = _InMemoryParser(headers, stream(), max_files=most, max_fields=_FIELDS, max_part_size=1 << 16)  # type: ignore[arg-type]
        form = await parser.parse()
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [Upload(_clean(file.filename), await file.read()) for file in files]
        await form.close()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise Refusal(413, f"more than {most} pictures in one request", kind="size") from error
        raise Refusal(400, f"broken form: {error.message}", kind="form") from error
    except (FormParserError, KeyError, ValueError, LookupError) as error:
        raise Refusal(400, f"broken form: {_clean(str(error))}", kind="form") from error
    if not uploads:
        raise Refusal(400, "the form holds no file; send the picture as a file field", kind="form")
    return uploads


def _decompress(body: bytes, coding: str, share: Share, limits: Limits) -> bytes:
    """`body` unpacked in steps, so that a small body cannot become a large one unseen."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS)
    out = bytearray()
    rest = body
    try:
        while rest and not unpacker.eof:
            piece = unpacker.decompress(rest, 1 << 20)
            if len(out) + len(piece) > limits.body:
                raise _too_large(limits)
            share.take(len(piece))
            out += piece
            rest = unpacker.unconsumed_tail
    except zlib.error as error:
        raise Refusal(400, f"the body is not {coding}: {error}", kind="form") from error
    if not unpacker.eof:
        raise Refusal(400, f"the {coding} body ends too early", kind="form")
    return bytes(out)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body is larger than {limits.body:,} bytes", kind="size", headers={"Connection": "close"})


def _clean(text: str | None) -> str:
    """A client's text, short and printable, fit to be shown."""
    return "".join(c for c in (text or "")[:200] if c.isprintable())

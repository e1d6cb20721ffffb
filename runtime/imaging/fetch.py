# SPDX-License-Identifier: Apache-2.0
"""Image files from http and https addresses, with a limit on size and time."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import PurePosixPath

from internimage_deploy.errors import UserError

MAX_BYTES = 64 << 20
TIMEOUT_S = 30.0
_CHUNK = 1 << 16


def is_web_address(text: str) -> bool:
    """True for an http or https address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def address_stem(address: str) -> str:
    """What the results of an address are named after: its last path segment without ending, or the host."""
    parts = urllib.parse.urlsplit(address)
    name = PurePosixPath(urllib.parse.unquote(parts.path)).stem or (parts.hostname or "image")
    return re.sub(r"[^\w.-]", "_", name)


def without_credentials(text: str) -> str:
    """`text` without the user and password of an address (rtsp://USER:SECRET@host), which belong in no message."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https alone: a server must not send us on to other kinds of addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def fetch(address: str, *, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S) -> bytes:
    """The content of `address`.

    Args:
        address: http or https.
        max_bytes: largest content.
        timeout_s: longest wait for the connection, for each piece, and for the whole.

    Raises:
        UserError: no answer, an answer other than success, or more than `max_bytes` or `timeout_s`.
    """
    shown = without_credentials(address)
    request = urllib.request.Request(address, headers={"User-Agent": "internimage-deploy", "Accept": "image/*"})
    give_up = time.monotonic() + timeout_s
    content = bytearray()
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            while chunk := response.read1(_CHUNK):  # what has arrived: `read` would wait for the whole chunk
                content += chunk
                if len(content) > max_bytes:
                    raise UserError(f"{shown}: larger than {max_bytes >> 20} MiB; download it and name the file")
                if time.monotonic() > give_up:
                    raise UserError(f"{shown}: not complete after {timeout_s:g} s; download it and name the file")
            if response.length:
                raise UserError(f"{shown}: ended {response.length:,} bytes early; try again")
    except urllib.error.HTTPError as error:
        raise UserError(f"{shown}: the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise UserError(f"{shown}: cannot be fetched ({error.reason}); check the address") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{shown}: cannot be fetched ({error or type(error).__name__}); check the address") from error
    return bytes(content)

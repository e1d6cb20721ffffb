# SPDX-License-Identifier: Apache-2.0
"""Image files from http and https addresses, with a limit on size and time."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import PurePosixPath
from typing import Any

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


class _TimeLimit:
    """Ends connections when the time is up: a server that sends a byte now and then meets no timeout of a socket."""

    def __init__(self, seconds: float) -> None:
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self.over = False

    def __enter__(self) -> _TimeLimit:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, connection: http.client.HTTPConnection) -> None:
        """Watch a connection that has just been made."""
        self._sockets.append(connection.sock)
        if self.over:
            self._end()

    def _end(self) -> None:
        self.over = True
        for made in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(made, socket.SHUT_RDWR)


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, limit: _TimeLimit) -> None:
        super().__init__()
        self._limit = limit

    def http_open(self, request: urllib.request.Request) -> Any:
        limit = self._limit

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                limit.add(self)

        return self.do_open(Connection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, limit: _TimeLimit) -> None:
        super().__init__()
        self._limit = limit

    def https_open(self, request: urllib.request.Request) -> Any:
        limit = self._limit

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                limit.add(self)

        return self.do_open(Connection, request)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, response: Any, *about: Any) -> urllib.request.Request | None:
        response.close()  # the handler would read its body, of any length
        return super().redirect_request(request, response, *about)


def _opener(limit: _TimeLimit) -> urllib.request.OpenerDirector:
    """Opens http and https alone: a server must not send us on to other kinds of addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _HTTPHandler(limit),
        _HTTPSHandler(limit),
        urllib.request.HTTPDefaultErrorHandler(),
        _RedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
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
    try:
        with _TimeLimit(timeout_s) as limit:
            return _fetch(address, limit, max_bytes, timeout_s)
    except UserError as error:
        raise (_late(shown, timeout_s) if limit.over else error) from error
    except urllib.error.HTTPError as error:
        raise UserError(f"{shown}: the server answered {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if limit.over:
            raise _late(shown, timeout_s) from error
        reason = error.reason if isinstance(error, urllib.error.URLError) else error or type(error).__name__
        raise UserError(f"{shown}: cannot be fetched ({reason}); check the address") from error


def _fetch(address: str, limit: _TimeLimit, max_bytes: int, timeout_s: float) -> bytes:
    shown = without_credentials(address)
    request = urllib.request.Request(address, headers={"User-Agent": "internimage-deploy", "Accept": "image/*"})
    give_up = time.monotonic() + timeout_s
    content = bytearray()
    with _opener(limit).open(request, timeout=timeout_s) as response:
        while chunk := response.read1(_CHUNK):  # what has arrived: `read` would wait for the whole chunk
            content += chunk
            if len(content) > max_bytes:
                raise UserError(f"{shown}: larger than {max_bytes >> 20} MiB; download it and name the file")
            if time.monotonic() > give_up:
                raise _late(shown, timeout_s)
        if limit.over:
            raise _late(shown, timeout_s)
        if response.length:
            raise UserError(f"{shown}: ended {response.length:,} bytes early; try again")
    return bytes(content)


def _late(shown: str, timeout_s: float) -> UserError:
    return UserError(f"{shown}: not complete after {timeout_s:g} s; download it and name the file")

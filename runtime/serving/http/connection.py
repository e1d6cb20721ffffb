# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection: uvicorn's protocol with limits on header bytes, pipelined requests, and time."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from internimage_deploy.runtime.serving.settings import Limits, client_of

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 100
MAX_WAITING_REQUESTS = 8
"""Requests of one connection that wait for the response to an earlier one; further bytes stay unparsed."""

_HEADER_PIECE = 1 << 10  # bytes parsed at once where headers may end: bounds the requests that one piece can hold
_BODY_PIECE = 64 << 10
_CHUNKS_AT_ONCE = 256  # of a body, each of which costs as much as a large one; then other connections have their turn
_CHUNK_OVERHEAD = 8  # a body in chunks of 40 bytes has so many times its framing
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
_LOG_EVERY_S = 60.0


@dataclass
class Connections:
    """The open connections of a server, by the client they come from; see `client_of`."""

    limits: Limits
    peers: dict[str, OrderedDict[HttpConnection, None]] = field(default_factory=dict)  # oldest first

    def count(self, address: str) -> int:
        """Number of open connections of the client at `address`."""
        return len(self.peers.get(client_of(address), ()))

    def add(self, connection: HttpConnection, address: str) -> None:
        """Count a new connection. One client holds so many at most: its oldest idle connection is closed."""
        peers = self.peers.setdefault(client_of(address), OrderedDict())
        peers[connection] = None
        if len(peers) > self.limits.connections_per_client and not self.limits.is_proxy(address):
            idle = next((other for other in peers if not other.in_request()), None)
            if idle is not None:
                idle.abort()
                peers.pop(idle, None)

    def remove(self, connection: HttpConnection, address: str) -> None:
        """Forget a closed connection."""
        client = client_of(address)
        peers = self.peers.get(client)
        if peers is not None:
            peers.pop(connection, None)
            if not peers:
                del self.peers[client]


class _Flow(FlowControl):
    """Keeps reading paused while the connection holds bytes that it does not parse yet."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class _Transport:
    """A transport that ignores what a request still wants of it after it was closed; uvloop's raises then."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()


class HttpConnection(HttpToolsProtocol):
    """uvicorn's protocol with what it lacks to face clients that mean harm. `limited_protocol` binds it to limits.

    - The headers of a request arrive within `Limits.header_s`, or the connection ends with a 408.
    - They are `MAX_HEADER_BYTES` and `MAX_HEADERS` at most, or it ends with a 431. Whatever else is not body counts as
      well: trailers, chunk extensions, empty lines before a request.
    - After `MAX_WAITING_REQUESTS` pipelined requests nothing more is parsed or read until responses have gone out.
    - A client that does not take its response for `Limits.body_s` loses the connection.
    """

    limits: Limits
    open: Connections

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unparsed = b""
    _overhead = 0  # bytes that are not body, since the last end of headers or of a message
    _headers = 0
    _body_left = 0  # bytes of a body of announced length that are still to come
    _body_bytes = 0  # of the body that has arrived
    _refused = False
    _last_response = b""
    _feeding = False
    _pausing = False
    _chunks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(_Transport(transport))  # type: ignore[arg-type]
        self.flow: FlowControl = _Flow(self.transport)
        self._address = self.client[0] if self.client else ""
        self.open.add(self, self._address)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_write_timer()
        self._unparsed = b""
        self.open.remove(self, self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed = self._unparsed + data if self._unparsed else data
        if not self._pausing:
            self._feed()
        self._watch_headers()

    def in_request(self) -> bool:
        """True from the end of a request's headers to the end of its response."""
        return self.cycle is not None and not self.cycle.response_complete

    def abort(self) -> None:
        """Close the connection without a response."""
        self._refused = True
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(None)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    # ---- parsing

    def _feed(self) -> None:
        """Parse what has arrived, in pieces, as long as requests may be added and others need not wait for it."""
        if self._feeding:  # a response that is complete at once calls back from inside
            return
        self._feeding = True
        self._chunks = 0
        try:
            position = 0
            data = self._unparsed
            while position < len(data) and not (self._must_wait() or self._ended() or self._must_pause()):
                size = min(self._body_left, _BODY_PIECE) if self._body_left else _HEADER_PIECE
                piece = data[position : position + size]
                position += len(piece)
                self._overhead += len(piece)
                super().data_received(piece)
                if self._headers > MAX_HEADERS:
                    self._refuse()
                elif self._overhead > MAX_HEADER_BYTES + self._body_bytes // _CHUNK_OVERHEAD:
                    if self._body_bytes:
                        self._close_with(400, "the body comes in chunks that are too small")
                    else:
                        self._refuse()
            self._unparsed = b"" if self._ended() else data[position:]
        finally:
            self._feeding = False
        self.flow.held = bool(self._unparsed)  # type: ignore[attr-defined]
        if self._unparsed:
            self.flow.pause_reading()
            if self._must_pause() and not self._must_wait():
                self._pausing = True
                self.loop.call_soon(self._continue)

    def _must_pause(self) -> bool:
        return self._chunks >= _CHUNKS_AT_ONCE

    def _must_wait(self) -> bool:
        return len(self.pipeline) >= MAX_WAITING_REQUESTS

    def _ended(self) -> bool:
        return self._refused or self.transport.is_closing()

    def _refuse(self) -> None:
        if not self._refused:
            self._close_with(
                431, f"the request headers are above {MAX_HEADER_BYTES >> 10} KiB, or more than {MAX_HEADERS}"
            )

    # ---- the parser's events

    def on_message_begin(self) -> None:
        self._headers = 0
        self._body_bytes = 0
        self._body_left = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers <= MAX_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._headers > MAX_HEADERS:
            self._refuse()
        if self._refused:
            return
        self._overhead = 0
        for name, value in self.headers:
            if name == b"content-length" and value.isdigit():
                self._body_left = int(value)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._chunks += 1
        self._overhead = max(self._overhead - len(body), 0)
        self._body_bytes += len(body)
        self._body_left = max(self._body_left - len(body), 0)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._overhead = 0
        self._body_left = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refused and not self.in_request():
            self._finish()
        elif self._unparsed and not self._ended():
            self.flow.held = False  # type: ignore[attr-defined]
            self.loop.call_soon(self._continue)

    def _continue(self) -> None:
        self._pausing = False
        if not self._ended():
            self._unset_keepalive_if_required()
            self._feed()
            self._watch_headers()
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        self._close_with(400, msg)

    def _close_with(self, status: int, reason: str) -> None:
        """Parse nothing more, and end the connection with a response, after those that are still due."""
        self._refused = True
        self._unparsed = b""
        body = json.dumps({"error": reason}).encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self._last_response = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        # A request whose own body is broken gets this as its response.
        own = self.in_request() and self.cycle.more_body and not self.cycle.response_started and not self.pipeline
        if own or not self.in_request():
            self._finish()
        else:
            self.flow.held = True  # type: ignore[attr-defined]
            self.flow.pause_reading()

    def _finish(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._last_response)
            self.transport.close()

    # ---- time

    def _watch_headers(self) -> None:
        if self.in_request():
            self._disarm()
        elif self._timer is None and not self._ended():
            self._arm()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.limits.header_s, self._close_late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_late(self) -> None:
        self._timer = None
        if not self.in_request():
            self._close_with(408, "the request headers arrived too slowly")

    def _watch_writing(self, left_before: int | None) -> None:
        """Close the connection when none of its output has been taken since the last look."""
        left = self.transport.get_write_buffer_size()
        if left_before is not None and left >= left_before:
            self.abort()
            return
        self._write_timer = self.loop.call_later(self.limits.body_s, self._watch_writing, left)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def limited_protocol(limits: Limits, connections: Connections) -> type[HttpConnection]:
    """`HttpConnection` for a server of these limits, which counts its connections in `connections`."""
    return type("LimitedConnection", (HttpConnection,), {"limits": limits, "open": connections})


class RateLimitedLog(logging.Filter):
    """Lets each message pass once a minute: clients must not be able to fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}
        self._dropped: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)  # the template: its arguments may be the client's choice
        now = time.monotonic()
        if record.levelno != logging.WARNING:
            return True
        if now - self._last.get(message, -_LOG_EVERY_S) < _LOG_EVERY_S:
            self._dropped[message] += 1
            return False
        self._last[message] = now
        if dropped := self._dropped.pop(message, 0):
            record.msg, record.args = f"{record.getMessage()} ({dropped} more since)", ()
        return True

# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of one machine: uvicorn, with a limit on how long headers may take, and a clean end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.settings import Settings

_OWN_FILES = 512  # descriptors beside the connections: workers, libraries, refused connections that are still open
_TOO_SLOW = b'{"error": "the request headers came too slowly"}'
_TIMEOUT_ANSWER = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TOO_SLOW), _TOO_SLOW)
)


def protocol_with_deadline(header_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol, which closes connections whose request headers take longer than `header_s` seconds.

    uvicorn itself waits for ever, so that a few clients sending a byte a minute could hold every connection.
    """

    class Deadline(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_request():
                self._disarm()
            elif self._late is None:
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _in_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _arm(self) -> None:
            self._late = self.loop.call_later(header_s, self._give_up)

        def _disarm(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if not self._in_request() and not self.transport.is_closing():
                self.transport.write(_TIMEOUT_ANSWER)
                self.transport.close()

    return Deadline


def serve(settings: Settings, *, host: str, port: int, drain_s: float) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted, for at most `drain_s` seconds.

    Raises:
        UserError: the address cannot be bound, or the model cannot be loaded.
    """
    if not settings.model.path.exists():
        raise UserError(f"{settings.model.path}: no such file")
    failure: list[UserError] = []

    def failed(error: UserError) -> None:
        failure.append(error)
        server.should_exit = True

    # Pictures are decoded in threads of this process. With the usual 5 ms between switches a burst of requests would
    # wait for them again and again, and refusing takes far less time than that.
    sys.setswitchinterval(0.0005)
    limits = settings.limits
    app = create_app(settings, failed=failed)
    config = uvicorn.Config(
        app,
        http=protocol_with_deadline(limits.header_s),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="on",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(int(drain_s), 1),
    )
    server = uvicorn.Server(config)
    app.state.service.connections = lambda: len(server.server_state.connections)
    _allow_open_files(limits.connections + _OWN_FILES)
    sock = _bind(host, port)
    logging.getLogger("internimage_deploy.serving").info("listening on http://%s:%d", *sock.getsockname()[:2])
    # uvicorn drains on these and raises them again afterwards; the end asked for is no failure.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    with sock:
        server.run(sockets=[sock])
    if failure:
        raise failure[0]


def _allow_open_files(number: int) -> None:
    """Raise the soft limit, which is 1024 on many machines, so that every allowed connection can be accepted."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    sock = socket.socket(family, kind, number)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return sock

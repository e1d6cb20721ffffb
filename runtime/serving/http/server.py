# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of one machine: uvicorn with a deadline for request headers, and a shutdown that finishes work."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.settings import Settings

_OTHER_FILES = 512  # descriptors beside the connections: workers, libraries, refused connections that are still open
_BACKLOG = 2048  # uvicorn's own; the kernel caps it
_TOO_SLOW = b'{"error": "the request headers arrived too slowly"}'
_TIMEOUT_RESPONSE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TOO_SLOW), _TOO_SLOW)
)


def protocol_with_header_deadline(header_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol, closing connections whose request headers take longer than `header_s` seconds.

    uvicorn itself waits without limit, so that a few clients sending a byte a minute could hold every connection.
    """

    class HeaderDeadlineProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_request():
                self._disarm()
            elif self._timer is None:
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _in_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _arm(self) -> None:
            self._timer = self.loop.call_later(header_s, self._close_late)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_late(self) -> None:
            self._timer = None
            if not self._in_request() and not self.transport.is_closing():
                self.transport.write(_TIMEOUT_RESPONSE)
                self.transport.close()

    return HeaderDeadlineProtocol


def serve(settings: Settings, *, host: str, port: int, drain_s: float) -> None:
    """Serve until SIGTERM or SIGINT, then finish the accepted requests, for at most `drain_s` seconds.

    Raises:
        UserError: the address cannot be bound, or the model cannot be loaded.
    """
    if not settings.model.path.exists():
        raise UserError(f"{settings.model.path}: no such file")
    failure: list[UserError] = []

    def stop_server(error: UserError) -> None:
        failure.append(error)
        server.should_exit = True

    # Images are decoded in threads of this process. With the usual 5 ms between switches a burst of requests would
    # wait for them again and again, and a 503 takes far less time than that.
    sys.setswitchinterval(0.0005)
    limits = settings.limits
    app = create_app(settings, on_load_failure=stop_server)
    config = uvicorn.Config(
        app,
        http=protocol_with_header_deadline(limits.header_s),
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
    _allow_open_files(limits.connections + _OTHER_FILES)
    sock = _bind(host, port)
    logging.getLogger("internimage_deploy.serving").info("listening on http://%s:%d", *sock.getsockname()[:2])
    # uvicorn drains on these and raises them again afterwards, which must not end the process with a failure.
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
    limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    sock = socket.socket(family, kind, number)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)  # so that whoever reads "listening" in the log can connect
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return sock

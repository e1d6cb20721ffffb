# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of one machine: uvicorn with limits on connections, and a shutdown that finishes work."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.backends.registry import choose
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.http.connection import Connections, RateLimitedLog, limited_protocol
from internimage_deploy.runtime.serving.settings import Settings

log = logging.getLogger("internimage_deploy.serving")

_OTHER_FILES = 512  # descriptors beside the connections: workers, libraries, refused connections that are still open
_CLOSE_S = 5.0  # to free everything, after the time to finish accepted requests
_BACKLOG = 2048  # uvicorn's own; the kernel caps it


class _Server(uvicorn.Server):
    """uvicorn's server, with an end of the process in time whatever still runs in it."""

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._end = threading.Timer(drain_s + _CLOSE_S, self._exit)
        self._end.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._end.start()
        super().handle_exit(sig, frame)

    def _exit(self) -> None:
        log.error("the service did not end in time; it is ended")
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


def serve(settings: Settings, *, host: str, port: int, drain_s: float) -> None:
    """Serve until SIGTERM or SIGINT, then finish the accepted requests, for at most `drain_s` seconds.

    Raises:
        UserError: the address cannot be bound, or the model cannot be loaded.
    """
    # What the file shows by itself is found before the address is taken; the worker processes find the rest.
    choose(settings.model.path, settings.model.options.backend)
    model_card(settings.model.path)
    failure: list[UserError] = []

    def stop_server(error: UserError) -> None:
        failure.append(error)
        server.should_exit = True

    # Images are decoded in threads of this process. With the usual 5 ms between switches a burst of requests would
    # wait for them again and again, and a 503 takes far less time than that.
    sys.setswitchinterval(0.0005)
    limits = settings.limits
    app = create_app(settings, on_load_failure=stop_server)
    connections = Connections(limits)
    config = uvicorn.Config(
        app,
        http=limited_protocol(limits, connections),
        ws="none",
        proxy_headers=False,  # the gateway reads X-Forwarded-For, from the proxies that the settings name
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="on",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(int(drain_s), 1),
    )
    server = _Server(config, drain_s)
    app.state.service.connections = lambda: len(server.server_state.connections)
    app.state.service.connections_from = connections.count
    logging.getLogger("uvicorn.error").addFilter(RateLimitedLog())
    _allow_open_files(limits.connections + _OTHER_FILES)
    sock = _bind(host, port)
    log.info("listening on http://%s:%d", *sock.getsockname()[:2])
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

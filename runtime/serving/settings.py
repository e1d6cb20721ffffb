# SPDX-License-Identifier: Apache-2.0
"""Settings of a service: the model, limits on requests, batching, the bearer token."""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.options import LoadOptions

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Limits:
    """What requests may cost, in bytes and seconds; the maximum number of pixels is `LoadOptions.max_pixels`."""

    body: int = 32 << 20  # of one request
    batch_images: int = 16  # in one request
    memory: int = 1 << 30  # bodies and decoded images of all requests together
    body_s: float = 30.0  # to send the body
    header_s: float = 10.0  # to send the headers
    deadline_s: float = 30.0  # from the request's last byte to its labels
    rate: float = 0.0  # requests per second and client, see `client_of`; 0 = no limit
    burst: int = 20  # requests a client may send at once before `rate` applies
    connections: int = 1024
    proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For names the client

    @property
    def connections_per_client(self) -> int:
        """Connections that one client may hold, so that it cannot hold all; proxies may."""
        return max(self.connections * 3 // 4, 1)

    def is_proxy(self, address: str) -> bool:
        """True for an address that belongs to `proxies`."""
        found = parse_address(address)
        return found is not None and any(found in network for network in _networks(self.proxies))


def client_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network of an IPv6 address, all of which one host has."""
    found = parse_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(found), 64), strict=False))
    return str(found or address)


def parse_address(text: str) -> IPAddress | None:
    """An IP address, an IPv4-mapped IPv6 address as the IPv4 address; None for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache
def _networks(proxies: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(proxy, strict=False) for proxy in proxies)


@dataclass(frozen=True)
class Batching:
    """How images of different requests run together; the maximum batch size is `LoadOptions.batch`."""

    delay_s: float = 0.005  # how long the first image of a batch waits for others
    queue: int = 64  # maximum number of waiting images


@dataclass(frozen=True)
class ModelSettings:
    """A model file and how it is loaded: the same in every worker."""

    path: Path
    options: LoadOptions = field(default_factory=lambda: LoadOptions(batch=8, max_pixels=25_000_000))


@dataclass(frozen=True)
class Settings:
    """All settings of a service."""

    model: ModelSettings
    name: str = "model"  # under /v2/models/
    workers: int = 1
    run_s: float = 120.0  # a worker that needs longer for one batch counts as hung
    token: str = field(default="", repr=False)  # empty: no token is required
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)

    @property
    def capacity(self) -> int:
        """Maximum number of images in work at once: those that wait and those that run."""
        return self.batching.queue + self.model.options.batch * self.workers


def model_name(path: Path) -> str:
    """The name a model is served under: the file's, with "_" for every character that does not belong in a URL."""
    name = "".join(c if (c.isalnum() and c.isascii()) or c in "-_." else "_" for c in path.stem)
    return name.strip(".") or "model"


def read_token(path: Path | None, environment: str | None) -> str:
    """The bearer token from a file, or from the environment; empty if there is none.

    Raises:
        UserError: the file cannot be read, or the token is empty, too short to be a secret, or not plain ASCII.
    """
    if path is not None:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token file {path}: {error}") from error
        where = str(path)
    elif environment is not None:
        token, where = environment.strip(), "the environment"
    else:
        return ""
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"the token in {where} has {len(token)} characters, expected at least 16 of printable ASCII without "
            "spaces; make one with  python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token

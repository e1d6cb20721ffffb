# SPDX-License-Identifier: Apache-2.0
"""What can be set about a service, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.options import LoadOptions


@dataclass(frozen=True)
class Limits:
    """What a request may cost. Sizes in bytes, times in seconds."""

    body: int = 32 << 20
    pixels: int = 25_000_000  # of one picture
    batch_pictures: int = 16  # in one request
    memory: int = 1 << 30  # bodies and decoded pictures of all requests together
    body_s: float = 30.0  # to send the body
    header_s: float = 10.0  # to send the headers
    deadline_s: float = 30.0  # from the request's last byte to its answer
    rate: float = 0.0  # requests per second and client address; 0 = no limit
    burst: int = 20  # requests a client may send at once before `rate` applies
    connections: int = 1024


@dataclass(frozen=True)
class Batching:
    """How pictures of different requests run together."""

    size: int = 8  # most pictures in one run of the network
    delay_s: float = 0.005  # how long the first picture waits for company
    queue: int = 64  # most pictures that wait


@dataclass(frozen=True)
class ModelSettings:
    """Which model every worker loads, and how; the batch size and pixel limit are those of `Settings`."""

    path: Path
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True)
class Settings:
    """All of a service."""

    model: ModelSettings
    name: str = "model"  # under /v2/models/
    workers: int = 1
    run_s: float = 120.0  # a run of the network that takes longer counts as hung
    token: str = field(default="", repr=False)  # empty: no token asked for
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)

    @property
    def places(self) -> int:
        """Pictures that may be in work at once: those that wait and those that run."""
        return self.batching.queue + self.batching.size * self.workers


def model_name(path: Path) -> str:
    """The name a model is served under: the file's, without what does not belong into an address."""
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

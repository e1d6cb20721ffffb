# SPDX-License-Identifier: Apache-2.0
"""`serve`: segmentation over HTTP, on this machine or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internimage_deploy.cli.cluster_options import check_local, cluster_options
from internimage_deploy.cli.load_options import takes_load_options
from internimage_deploy.cli.options import (
    FilePath,
    Number,
    Option,
    apply_options,
    backend_option,
    batch_option,
    engine_options,
    max_pixels_option,
    model_argument,
    resize_option,
    threads_option,
    window_options,
)
from internimage_deploy.errors import MissingDependency, UserError

if TYPE_CHECKING:
    from internimage_deploy.runtime.options import LoadOptions
    from internimage_deploy.runtime.serving.settings import Settings

TOKEN_VARIABLE = "INTERNIMAGE_DEPLOY_TOKEN"

_MIB = 1 << 20
_HEADER_S = 10.0

_ADDRESS_OPTIONS = apply_options(
    click.option(
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Address to listen on; 0.0.0.0 listens on every address of this machine.",
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="Port to listen on; 0 chooses a free one.",
    ),
    click.option("--name", help="Name of the model in /v2/models/NAME.  [default: the file's name]"),
    click.option(
        "--token-file",
        type=FilePath,
        help="File with the bearer token that clients must send; the environment variable "
        f"{TOKEN_VARIABLE} can hold the token instead.",
    ),
)
_BATCHING_OPTIONS = apply_options(
    click.option(
        "--workers",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Number of worker processes; each loads the model.",
    ),
    batch_option(8),
    click.option(
        "--delay-ms",
        cls=Option,
        aliases=("--delay",),
        type=Number(0, 10_000),
        default=5,
        show_default=True,
        help="Milliseconds that the first image of a batch waits for others.",
    ),
    click.option(
        "--queue",
        type=click.IntRange(1, 100_000),
        default=64,
        show_default=True,
        help="Maximum number of images that wait; requests beyond it get a 503.",
    ),
    click.option(
        "--deadline",
        type=Number(0.1, 3600),
        default=30,
        show_default=True,
        help="Seconds after which an image that is not done is given up with a 503.",
    ),
)
_LIMIT_OPTIONS = apply_options(
    click.option(
        "--max-body",
        type=Number(0.001, 4096),
        default=32,
        show_default=True,
        help="Maximum size of a request body in MiB.",
    ),
    max_pixels_option(25_000_000),
    click.option(
        "--max-memory",
        type=Number(1),
        default=1024,
        show_default=True,
        help="Maximum memory in MiB for the bodies and images of all requests together.",
    ),
    click.option(
        "--body-timeout",
        type=Number(0.1, 3600),
        default=30,
        show_default=True,
        help="Seconds a client may take to send a request.",
    ),
    click.option(
        "--rate",
        type=Number(0),
        default=0,
        show_default=True,
        help="Maximum number of requests per second and client address; 0 for no limit.",
    ),
    click.option(
        "--proxy",
        "proxies",
        multiple=True,
        metavar="ADDRESS",
        callback=lambda _context, _option, values: tuple(_network(value) for value in values),
        help="Address or network of a reverse proxy (10.0.0.5 or 10.0.0.0/8) whose X-Forwarded-For header names the "
        "client; may be repeated. From everybody else the header is ignored.",
    ),
    click.option(
        "--drain",
        type=Number(1, 3600),
        default=30,
        show_default=True,
        help="Seconds to finish accepted requests after SIGTERM.",
    ),
)


_EXAMPLES = """\b
Examples:
  internimage-deploy serve model.onnx
  internimage-deploy serve model.onnx --host 0.0.0.0 --port 8080 --token-file token.txt
  internimage-deploy serve model.onnx --executor ray --ray-address auto --replicas 2-8
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@_ADDRESS_OPTIONS
@_BATCHING_OPTIONS
@_LIMIT_OPTIONS
@resize_option
@window_options
@cluster_options
@backend_option
@engine_options
@threads_option
@takes_load_options
def serve(
    model: Path,
    *,
    host: str,
    port: int,
    name: str | None,
    token_file: Path | None,
    workers: int,
    delay_ms: float,
    queue: int,
    deadline: float,
    max_body: float,
    max_memory: float,
    body_timeout: float,
    rate: float,
    proxies: tuple[str, ...],
    drain: float,
    options: LoadOptions,
    **cluster: Any,
) -> None:
    """Serve MODEL over HTTP: POST images to /v1/segment, or open the page at /.

    The service also has the Open Inference Protocol under /v2, metrics at /metrics, and health at /healthz and /readyz.
    It ends on SIGTERM or Ctrl-C, after finishing the requests it accepted.
    """
    from internimage_deploy.runtime.serving.settings import (
        Batching,
        Limits,
        ModelSettings,
        Settings,
        model_name,
        read_token,
    )

    token = read_token(token_file, os.environ.get(TOKEN_VARIABLE))
    settings = Settings(
        model=ModelSettings(
            path=model.absolute(),
            options=options,
        ),
        name=model_name(Path(f"{name}.onnx") if name else model),
        workers=workers,
        token=token,
        limits=Limits(
            body=int(max_body * _MIB),
            memory=int(max_memory * _MIB),
            body_s=body_timeout,
            header_s=min(body_timeout, _HEADER_S),
            deadline_s=deadline,
            rate=rate,
            proxies=proxies,
        ),
        batching=Batching(delay_s=delay_ms / 1e3, queue=queue),
    )
    if not token and not _is_loopback(host):
        click.echo(
            f"note: {host} can be reached from other machines and no token is required; --token-file changes that",
            err=True,
        )
    if cluster.pop("executor") == "ray":
        _serve_on_ray(settings, host, port, drain, **cluster)
        return
    check_local()
    try:
        from internimage_deploy.runtime.serving.http.server import serve as serve_locally
    except ImportError as error:
        raise _missing(error) from error
    serve_locally(settings, host=host, port=port, drain_s=drain)


def _serve_on_ray(
    settings: Settings,
    host: str,
    port: int,
    drain_s: float,
    *,
    ray_address: str | None,
    replicas: tuple[int, int],
    gpus: float,
    cpus: float,
) -> None:
    try:
        from internimage_deploy.runtime.cluster import serve as ray_serve
    except ImportError as error:
        raise MissingDependency("ray[serve]", "serve,ray", "serving on a cluster") from error
    if port == 0:
        raise click.BadParameter("a cluster needs a port that is the same on every machine", param_hint="--port")
    ray_serve.serve(
        dataclasses.replace(settings, workers=replicas[1]),
        host=host,
        port=port,
        address=ray_address,
        replicas=replicas,
        gpus=gpus,
        cpus=cpus,
        drain_s=drain_s,
    )


def _missing(error: ImportError) -> UserError:
    return MissingDependency(error.name or "fastapi", "serve", "serving")


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no IP address or network, such as 10.0.0.5 or 10.0.0.0/8") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

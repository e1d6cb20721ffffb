# SPDX-License-Identifier: Apache-2.0
"""`serve`: pictures over HTTP, on this machine or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path
from typing import Any

import click

from internimage_deploy.cli.cluster_options import check_local, cluster_options
from internimage_deploy.cli.options import (
    Size,
    backend_option,
    engine_options,
    model_argument,
    threads_option,
)
from internimage_deploy.errors import MissingDependency, UserError

TOKEN_VARIABLE = "INTERNIMAGE_DEPLOY_TOKEN"


@click.command()
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name of the model in /v2/models/NAME.  [default: the file's name]")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help=f"File with the bearer token that clients must send; or set {TOKEN_VARIABLE}.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes with the model.")
@click.option("--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Most pictures in one run.")
@click.option("--delay", type=click.FloatRange(0, 10_000), default=5, show_default=True,
              help="Milliseconds the first picture of a run waits for others.")  # fmt: skip
@click.option("--queue", type=click.IntRange(1, 100_000), default=64, show_default=True,
              help="Most pictures that wait; more are answered with 503.")  # fmt: skip
@click.option("--deadline", type=click.FloatRange(0.1, 3600), default=30, show_default=True,
              help="Seconds after which a waiting picture is given up.")  # fmt: skip
@click.option("--max-body", type=click.FloatRange(0.001, 4096), default=32, show_default=True,
              help="Largest request in MiB.")  # fmt: skip
@click.option("--max-pixels", type=click.IntRange(1), default=25_000_000, show_default=True, help="Of one picture.")
@click.option("--max-memory", type=click.FloatRange(1), default=1024, show_default=True,
              help="MiB for the bodies and pictures of all requests together.")  # fmt: skip
@click.option("--body-timeout", type=click.FloatRange(0.1, 3600), default=30, show_default=True,
              help="Seconds a client may take to send a request.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0), default=0, show_default=True,
              help="Requests per second and client address; 0 for no limit.")  # fmt: skip
@click.option("--drain", type=click.FloatRange(1, 3600), default=30, show_default=True,
              help="Seconds to finish accepted requests after SIGTERM.")  # fmt: skip
@click.option("--resize", type=Size("LONGxSHORT", ("own",)), help="As in `segment`.")
@cluster_options
@backend_option
@engine_options
@threads_option
def serve(model: Path, **options: Any) -> None:
    """Serve MODEL over HTTP: POST pictures to /v1/segment, or open the page at /.

    Also answers the Open Inference Protocol under /v2, metrics at /metrics, health at /healthz and /readyz. Ends on
    SIGTERM or Ctrl-C, after answering what it accepted.
    """
    from internimage_deploy.runtime.options import LoadOptions

    try:
        from internimage_deploy.runtime.serving import settings as settings_module
    except ImportError as error:
        raise _missing(error) from error
    token = settings_module.read_token(options["token_file"], os.environ.get(TOKEN_VARIABLE))
    settings = settings_module.Settings(
        model=settings_module.ModelSettings(
            path=model.absolute(),
            options=LoadOptions(
                backend=options["backend"],
                threads=options["threads"],
                resize=options["resize"],
                trust_engine=options["trust_engine"],
                cuda_graphs=options["cuda_graphs"],
            ),
        ),
        name=settings_module.model_name(Path(options["name"] + ".x") if options["name"] else model),
        workers=options["workers"],
        token=token,
        limits=settings_module.Limits(
            body=int(options["max_body"] * (1 << 20)),
            pixels=options["max_pixels"],
            memory=int(options["max_memory"] * (1 << 20)),
            body_s=options["body_timeout"],
            header_s=min(options["body_timeout"], 10.0),
            deadline_s=options["deadline"],
            rate=options["rate"],
        ),
        batching=settings_module.Batching(
            size=options["batch"], delay_s=options["delay"] / 1e3, queue=options["queue"]
        ),
    )
    if not token and not _loopback(options["host"]):
        click.echo(
            f"note: {options['host']} can be reached from other machines and no token is asked for; "
            "--token-file changes that",
            err=True,
        )
    if options["executor"] == "ray":
        _serve_on_ray(settings, options)
        return
    check_local()
    try:
        from internimage_deploy.runtime.serving.http.server import serve as serve_here
    except ImportError as error:
        raise _missing(error) from error
    serve_here(settings, host=options["host"], port=options["port"], drain_s=options["drain"])


def _serve_on_ray(settings: Any, options: dict[str, Any]) -> None:
    try:
        from internimage_deploy.runtime.cluster import serve as ray_serve
    except ImportError as error:
        raise MissingDependency("ray[serve]", "serve,ray", "serving on a cluster") from error
    if options["port"] == 0:
        raise click.BadParameter("a cluster needs a port that is the same on every machine", param_hint="--port")
    ray_serve.serve(
        dataclasses.replace(settings, workers=options["replicas"][1]),
        host=options["host"],
        port=options["port"],
        address=options["ray_address"],
        replicas=options["replicas"],
        gpus=options["gpus"],
        cpus=options["cpus"],
        drain_s=options["drain"],
    )


def _missing(error: ImportError) -> UserError:
    return MissingDependency(error.name or "fastapi", "serve", "serving")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

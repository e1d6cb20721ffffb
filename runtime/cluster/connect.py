# SPDX-License-Identifier: Apache-2.0
"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.pipelines.storage import last_line


@dataclass(frozen=True)
class Cluster:
    """What is used of a cluster.

    Attributes:
        address: where it is; "auto" for the running one, None to start one on this machine.
        replicas: copies of the model, minimum and maximum.
        gpus: GPUs of each copy; may be a fraction.
        cpus: CPUs of each copy.
    """

    address: str | None = None
    replicas: tuple[int, int] = (1, 1)
    gpus: float = 0.0
    cpus: float = 1.0


def connect(address: str | None) -> None:
    """Connect this process to the cluster at `address`, see `Cluster`. Raises `UserError`."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    # Its HTTP server leaves X-Forwarded-For to the gateway; by default it would believe every client on this machine.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    for name in ("ray", "ray.data", "ray.serve"):  # their remarks about every step are for people who debug Ray
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {last_line(error)}") from error

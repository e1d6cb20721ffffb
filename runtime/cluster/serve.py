# SPDX-License-Identifier: Apache-2.0
"""The same application on Ray Serve: fronts that speak HTTP, and replicas of the model behind them.

Ray starts, scales and replaces replicas; `@serve.batch` collects pictures; a full queue is answered with 503.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution import work
from internimage_deploy.runtime.serving.execution.batcher import Timing
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.http_error import Refusal, overloaded
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import ModelSettings, Settings

log = logging.getLogger("internimage_deploy.serving")

APPLICATION = "internimage"
_MODEL = "Model"
_START_AGAIN_S = 1.0


class Model:
    """A replica: the loaded model and the batches of pictures it is sent."""

    def __init__(self, model: ModelSettings, batch: int, delay_s: float) -> None:
        self._segmenter = work.load(model, batch)
        self._run.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self._run.set_batch_wait_timeout_s(delay_s)  # type: ignore[attr-defined]

    async def card(self) -> ModelCard:
        """The model's card."""
        return self._segmenter.card

    async def segment(self, item: NetworkImage) -> tuple[Labels | Exception, Timing]:
        """Labels at the picture's own size, or why there are none."""
        arrived = time.monotonic()
        answer, timing = await self._run(item)
        timing.queue_s = time.monotonic() - arrived - timing.run_s
        return answer, timing

    @ray_serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def _run(self, items: list[NetworkImage]) -> list[tuple[Labels | Exception, Timing]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item.size, []).append(index)
        done: dict[int, tuple[Labels | Exception, Timing]] = {}
        for indices in groups.values():
            started = time.monotonic()
            answers = await asyncio.to_thread(work.run_each, self._segmenter, [items[index] for index in indices])
            for index, answer in zip(indices, answers, strict=True):
                done[index] = answer, Timing(run_s=time.monotonic() - started, batch=len(indices))
        return [done[index] for index in range(len(items))]


class RayEngine:
    """The replicas, as the application sees them; see `Engine`."""

    def __init__(self, _settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._handle: DeploymentHandle[Any] | None = None

    async def start(self) -> ModelCard:
        self._handle = ray_serve.get_deployment_handle(_MODEL, app_name=APPLICATION)
        while True:
            try:
                card = await self._handle.card.remote()
            except (RayActorError, DeploymentUnavailableError, BackPressureError):
                await asyncio.sleep(_START_AGAIN_S)
            else:
                assert isinstance(card, ModelCard)
                return card

    def refusal(self) -> Refusal:
        return overloaded("too many pictures are waiting already; try again")

    def alive(self) -> bool:
        return self._handle is not None

    async def segment(self, item: NetworkImage, deadline: float) -> tuple[Labels, Timing]:
        try:
            answer, timing = await self._ask(item, deadline)
        except RayActorError:
            log.warning("a replica was lost with a picture; it runs again")
            try:
                answer, timing = await self._ask(item, deadline)
            except RayActorError as error:
                raise overloaded("two replicas were lost with this picture", kind="worker", retry_after_s=2) from error
        if isinstance(answer, Exception):
            raise answer
        self._metrics.batch_size.observe(timing.batch)
        return answer, timing

    async def close(self) -> None:
        """Ray ends the replicas."""

    async def _ask(self, item: NetworkImage, deadline: float) -> tuple[Labels | Exception, Timing]:
        assert self._handle is not None
        response: Any = self._handle.segment.remote(item)
        try:
            answer: tuple[Labels | Exception, Timing] = await asyncio.wait_for(
                response, max(deadline - time.monotonic(), 0.001)
            )
        except asyncio.TimeoutError as error:
            response.cancel()
            raise overloaded("no replica answered in time; try again", kind="deadline", retry_after_s=2) from error
        except BackPressureError as error:
            raise self.refusal() from error
        except DeploymentUnavailableError as error:
            raise overloaded("no replica is running; try again", kind="worker", retry_after_s=2) from error
        return answer


def application(
    settings: Settings, *, replicas: tuple[int, int], gpus: float, cpus: float, drain_s: float = 30.0
) -> Any:
    """The Ray Serve application: `replicas` (least, most) copies of the model, each with so many GPUs and CPUs."""
    batching = settings.batching
    scale = _scale(replicas, target=batching.size) | {"graceful_shutdown_timeout_s": drain_s}
    model: Any = ray_serve.deployment(
        Model,
        name=_MODEL,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=2 * batching.size,
        max_queued_requests=batching.queue,
        **scale,
    )
    front: Any = ray_serve.deployment(
        ray_serve.ingress(_builder(settings))(),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.limits.connections,
        **scale,
    )
    return front.bind(model.bind(settings.model, batching.size, batching.delay_s))


def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    address: str | None,
    replicas: tuple[int, int],
    gpus: float,
    cpus: float,
    drain_s: float,
) -> None:
    """Serve on a cluster until SIGTERM or SIGINT.

    Args:
        settings: of the application.
        host: address every node listens on.
        port: port every node listens on.
        address: of the cluster; None starts one on this machine.
        replicas: least and most copies of the model.
        gpus: GPUs of each copy, may be a fraction.
        cpus: CPUs of each copy.
        drain_s: how long a replica may take to finish what it accepted.

    Raises:
        UserError: the cluster cannot be reached, or the model cannot be loaded there.
    """
    connect(address)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    limits = settings.limits
    patience_s = limits.body_s + limits.deadline_s + 10
    ray_serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=patience_s))
    try:
        ray_serve.run(
            application(settings, replicas=replicas, gpus=gpus, cpus=cpus, drain_s=drain_s),
            name=APPLICATION,
            route_prefix="/",
        )
    except (RuntimeError, RayTaskError, RayActorError) as error:
        reasons = re.findall(r"UserError: (.+)", str(error))
        reason = reasons[-1] if reasons else f"the model could not be started on the cluster: {error}"
        raise UserError(reason) from error
    log.info("listening on http://%s:%d", host, port)
    stop.wait()
    log.info("ending")
    ray_serve.delete(APPLICATION)
    if address is None:
        ray_serve.shutdown()
        ray.shutdown()


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine. Raises `UserError` if that fails."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    try:
        ray.init(address=address or "local", include_dashboard=False if address is None else None, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {error}") from error


def _builder(settings: Settings) -> Callable[[], FastAPI]:
    # Ray calls this inside each front, where the application's event loop is.
    def build() -> FastAPI:
        return create_app(settings, RayEngine)

    return build


def _scale(replicas: tuple[int, int], target: int) -> dict[str, Any]:
    least, most = replicas
    if least == most:
        return {"num_replicas": least}
    return {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}}

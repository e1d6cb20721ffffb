# SPDX-License-Identifier: Apache-2.0
"""The HTTP application on Ray Serve: front replicas that speak HTTP, and replicas of the model behind them.

Ray starts, scales and replaces the replicas; `@serve.batch` collects images; a full queue becomes a 503.
"""

from __future__ import annotations

import asyncio
import logging
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
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.load import model_card
from internimage_deploy.runtime.cluster.connect import connect
from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.execution import model_runner
from internimage_deploy.runtime.serving.execution.batcher import Timing
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.http_error import overloaded
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import ModelSettings, Settings

log = logging.getLogger("internimage_deploy.serving")

APPLICATION = "internimage"
_MODEL = "Model"
_START_AGAIN_S = 1.0

Result = tuple[Labels | Exception, Timing]


class Model:
    """A replica: the loaded model and the batches of images it receives."""

    def __init__(self, model: ModelSettings, delay_s: float) -> None:
        self._segmenter = model_runner.load(model)
        self._run.set_max_batch_size(model.options.batch)  # type: ignore[attr-defined]
        self._run.set_batch_wait_timeout_s(delay_s)  # type: ignore[attr-defined]

    async def card(self) -> ModelCard:
        """The model's card."""
        return self._segmenter.card

    async def segment(self, image: NetworkImage) -> Result:
        """Labels (H, W) at the image's own size or the reason why there are none, and the timing."""
        arrived = time.monotonic()
        labels, timing = await self._run(image)
        timing.queue_s = time.monotonic() - arrived - timing.run_s
        return labels, timing

    @ray_serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def _run(self, images: list[NetworkImage]) -> list[Result]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.size, []).append(index)
        results: dict[int, Result] = {}
        for indices in groups.values():
            started = time.monotonic()
            group = [images[index] for index in indices]
            outputs = await asyncio.to_thread(model_runner.run_each, self._segmenter, group)
            for index, labels in zip(indices, outputs, strict=True):
                results[index] = labels, Timing(run_s=time.monotonic() - started, batch=len(indices))
        return [results[index] for index in range(len(images))]


class RayExecutor:
    """The replicas, as the application sees them; see `Executor`."""

    def __init__(self, _settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._handle: DeploymentHandle[Model] | None = None

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

    def retry_after_s(self) -> int:
        return 1

    def alive(self) -> bool:
        return self._handle is not None

    async def segment(self, image: NetworkImage, deadline: float, _client: str) -> tuple[Labels, Timing]:
        try:
            labels, timing = await self._call(image, deadline)
        except RayActorError:
            log.warning("a replica was lost with an image; the image runs again")
            try:
                labels, timing = await self._call(image, deadline)
            except RayActorError as error:
                raise overloaded("two replicas were lost with this image", kind="worker", retry_after_s=2) from error
        if isinstance(labels, Exception):
            raise labels
        self._metrics.batch_size.observe(timing.batch)
        return labels, timing

    async def close(self) -> None:
        """Ray ends the replicas."""

    async def _call(self, image: NetworkImage, deadline: float) -> Result:
        assert self._handle is not None
        response: Any = self._handle.segment.remote(image)
        try:
            result: Result = await asyncio.wait_for(response, max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError as error:
            response.cancel()
            late = "no replica returned labels in time; try again"
            raise overloaded(late, kind="deadline", retry_after_s=2) from error
        except BackPressureError as error:
            full = "too many images are waiting already; try again"
            raise overloaded(full, retry_after_s=self.retry_after_s()) from error
        except DeploymentUnavailableError as error:
            raise overloaded("no replica is running; try again", kind="worker", retry_after_s=2) from error
        return result


def application(
    settings: Settings, *, replicas: tuple[int, int], gpus: float, cpus: float, drain_s: float = 30.0
) -> ray_serve.Application:
    """The Ray Serve application.

    Args:
        settings: of the service.
        replicas: minimum and maximum number of copies of the model.
        gpus: GPUs of each copy, may be a fraction.
        cpus: CPUs of each copy.
        drain_s: seconds a replica may take to finish what it accepted.
    """
    batch = settings.model.options.batch
    scale = _scale(replicas, target=batch) | {"graceful_shutdown_timeout_s": drain_s}
    deploy_model = ray_serve.deployment(
        name=_MODEL,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=2 * batch,
        max_queued_requests=settings.batching.queue,
        **scale,
    )
    deploy_front = ray_serve.deployment(
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.limits.connections,
        **scale,
    )
    model = deploy_model(Model).bind(settings.model, settings.batching.delay_s)
    return deploy_front(ray_serve.ingress(_builder(settings))()).bind(model)


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
        settings: of the service.
        host: address every node listens on.
        port: port every node listens on.
        address: of the cluster; None starts one on this machine.
        replicas: minimum and maximum number of copies of the model.
        gpus: GPUs of each copy, may be a fraction.
        cpus: CPUs of each copy.
        drain_s: seconds a replica may take to finish what it accepted.

    Raises:
        UserError: the model file is missing or damaged, the cluster cannot be reached or serves on another address
            already, or the model cannot be loaded there.
    """
    # What the file shows by itself is found before Ray is started. Whether its backend is installed is for the replicas
    # to say: the machine that runs this command may have no GPU.
    model_card(settings.model.path)
    connect(address)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    limits = settings.limits
    request_timeout_s = limits.body_s + limits.deadline_s + 10
    ray_serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=request_timeout_s))
    client = _get_global_client()
    assert client is not None  # it was started above
    kept = client.http_config
    if (kept.host, kept.port) != (host, port):
        raise UserError(
            f"Ray Serve runs on this cluster already, on {kept.host}:{kept.port}, and keeps that address; got "
            f"{host}:{port}: use --host {kept.host} --port {kept.port}, which replaces a model served there, or end "
            "Ray Serve first with  serve shutdown"
        )
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
    log.info("shutting down")
    ray_serve.delete(APPLICATION)
    if address is None:
        ray_serve.shutdown()
        ray.shutdown()


def _builder(settings: Settings) -> Callable[[], FastAPI]:
    # Ray calls this inside each front replica, where the application's event loop is.
    def build() -> FastAPI:
        return create_app(settings, RayExecutor)

    return build


def _scale(replicas: tuple[int, int], target: int) -> dict[str, Any]:
    minimum, maximum = replicas
    if minimum == maximum:
        return {"num_replicas": minimum}
    return {"autoscaling_config": {"min_replicas": minimum, "max_replicas": maximum, "target_ongoing_requests": target}}

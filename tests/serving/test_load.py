# SPDX-License-Identifier: Apache-2.0
"""Many clients at once: each gets what a direct call returns. `make soak` does this for a minute."""

import asyncio

import httpx
import numpy as np
import pytest

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.runtime.serving import service
from internimage_deploy.runtime.serving.admission import RateLimiter
from internimage_deploy.runtime.serving.execution.batcher import Batcher
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.settings import Batching, Limits, ModelSettings, Settings
from support import load
from support.served import WAIT_S, Served, encoded, stripes
from support.tiny_models import picture


def samples(color_path, count=24):
    """Images of several sizes, all different, with what direct calls return for them."""
    segmenter = Segmenter.load(color_path, threads=1)
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        colors = rng.permutation(np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 40, 10)]))
        height, width = [(40, 60), (64, 64), (33, 71)][number % 3]
        image = picture(height + number // 3, width, colors=tuple(map(tuple, colors)))[0]
        result = segmenter(image)
        made.append(load.Sample(encoded(image), result.mask(), result.labels))
    return made


def test_every_client_gets_the_labels_of_its_own_images(color_path, tmp_path):
    with Served(color_path, tmp_path, "--workers", "2", "--queue", "1000", "--deadline", WAIT_S) as server:
        report = asyncio.run(load.run(server.port, samples(color_path), clients=60, each=12))
        assert report.wrong == []
        assert (report.identical, len(report.refused)) == (60 * 12, 0)
        assert server.metric("internimage_pictures_total") == 60 * 12
        assert server.metric("internimage_batch_size_count") < 60 * 12, "nothing ran together"


def test_overload_gets_503_and_the_rest_is_segmented_right(color_path, tmp_path):
    with Served(color_path, tmp_path, "--queue", "4", "--batch", "2") as server:
        report = asyncio.run(load.run(server.port, samples(color_path), clients=60, each=3, max_pause_s=0.2))
        assert report.wrong == []
        assert len(report.refused) > 0
        assert report.identical + len(report.refused) == 60 * 3
        assert server.metric("internimage_refused_total") == len(report.refused)


def card():
    source = TensorSpec("image", "uint8", ("batch", "height", "width", 3))
    output = TensorSpec("logits", "float32", ("batch", 3, "h4", "w4"))
    return ModelCard("fake", ("a", "b", "c"), ((0, 0, 0),) * 3, source, output)


class GatedExecutor:
    """An executor whose network holds every batch until `gate` is set.

    While `patient`, images have no deadline.
    """

    def __init__(self, settings, _metrics):
        self.gate = asyncio.Event()
        self.patient = True
        self.batcher = Batcher(self.run, size=settings.model.options.batch, delay_s=0)

    async def run(self, images):
        await self.gate.wait()
        return [np.zeros(image.geometry.image, np.uint8) for image in images]

    async def start(self):
        return card()

    def alive(self):
        return True

    def retry_after_s(self):
        return self.batcher.retry_after_s()

    async def segment(self, image, deadline, client):
        deadline = float("inf") if self.patient else deadline
        return await self.batcher.submit(image, key=image.size, deadline=deadline, client=client)

    async def close(self):
        self.gate.set()
        await self.batcher.close()


def with_gated_executor(tmp_path, scenario, queue=3, batch=1, **limits):
    async def go():
        settings = Settings(
            ModelSettings(tmp_path / "none.onnx", LoadOptions(batch=batch)),
            limits=Limits(**limits),
            batching=Batching(queue=queue),
        )
        app = create_app(settings, GatedExecutor)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=WAIT_S) as client:
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
                await scenario(client, app.state.service.executor)

    asyncio.run(go())


async def fill(client, executor, count):
    data = stripes()[0]
    tasks = [asyncio.create_task(client.post("/v1/segment", content=data)) for _ in range(count)]
    while executor.batcher.running + executor.batcher.waiting < count:
        await asyncio.sleep(0.01)
    return tasks


def test_a_full_queue_gets_503_before_the_body_is_read(tmp_path):
    async def scenario(client, executor):
        accepted = await fill(client, executor, 4)

        async def body():
            raise AssertionError("the body was read")
            yield b""

        for path in ("/v1/segment", "/v1/segment/batch", "/v2/models/model/infer"):
            refused = await client.post(path, content=body())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/readyz")).status_code == 200
        executor.gate.set()
        assert [response.status_code for response in await asyncio.gather(*accepted)] == [200] * 4
        assert (await client.post("/v1/segment", content=stripes()[0])).status_code == 200, "no place came free"

    with_gated_executor(tmp_path, scenario)


@pytest.mark.parametrize("arrival_s", [WAIT_S, 0.05], ids=["in time", "slow"])
def test_requests_still_being_sent_hold_places_but_not_for_long(tmp_path, monkeypatch, arrival_s):
    monkeypatch.setattr(service, "_ARRIVAL_S", arrival_s)

    async def scenario(client, executor):
        executor.gate.set()
        data, started, sent = stripes()[0], asyncio.Semaphore(0), asyncio.Event()

        async def slow():
            yield data[:1]
            started.release()
            await sent.wait()
            yield data[1:]

        senders = [asyncio.create_task(client.post("/v1/segment", content=slow())) for _ in range(4)]
        for _ in senders:
            await started.acquire()
        if arrival_s == WAIT_S:
            response = await client.post("/v1/segment", content=data)
            assert response.status_code == 503
            assert "waiting already" in response.json()["error"]
        else:
            while (await client.post("/v1/segment", content=data)).status_code != 200:
                await asyncio.sleep(0.05)
            assert not any(sender.done() for sender in senders)
        sent.set()
        assert [response.status_code for response in await asyncio.gather(*senders)] == [200] * 4

    with_gated_executor(tmp_path, scenario)


def test_an_image_that_waits_too_long_is_given_up(tmp_path):
    async def scenario(client, executor):
        data = stripes()[0]
        first = asyncio.create_task(client.post("/v1/segment", content=data))
        while not executor.batcher.running:
            assert not first.done()
            await asyncio.sleep(0.01)
        executor.patient = False
        others = [asyncio.create_task(client.post("/v1/segment", content=data)) for _ in range(2)]
        for other in others:
            response = await other
            assert response.status_code == 503
            assert "without a turn" in response.json()["error"]
        executor.gate.set()
        assert (await first).status_code == 200

    with_gated_executor(tmp_path, scenario, deadline_s=1.5)  # decoding, on a busy machine, takes less


def test_batches_and_tensors_pass_the_queue_as_well(tmp_path):
    async def scenario(client, executor):
        executor.gate.set()
        data = stripes()[0]
        files = [("images", ("a.png", data))] * 3
        assert len((await client.post("/v1/segment/batch", files=files)).json()["results"]) == 3
        tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 4, 4, 3], "data": [0] * 96}
        response = await client.post("/v2/models/model/infer", json={"inputs": [tensor]})
        assert response.json()["outputs"][0]["shape"] == [2, 4, 4]

    with_gated_executor(tmp_path, scenario)


@pytest.mark.parametrize("path", ["/v1/segment/batch", "/v2/models/model/infer"])
def test_images_of_a_request_that_failed_do_not_run_on(tmp_path, path):
    async def scenario(client, executor):
        served = client._transport.app.state.service
        (other,) = await fill(client, executor, 1)
        held = served.memory.used
        if path.startswith("/v1"):
            form = {"files": [("images", (f"{number}.png", stripes()[0])) for number in range(6)]}
        else:
            tensor = {"name": "image", "datatype": "UINT8", "shape": [6, 4, 4, 3], "data": [0] * 288}
            form = {"json": {"inputs": [tensor]}}
        response = await client.post(path, **form)  # has no room for all
        assert response.status_code == 503, response.text
        assert served._places.total() == 1
        assert executor.batcher.waiting == 0
        assert served.memory.used == held
        executor.gate.set()
        assert (await other).status_code == 200

    with_gated_executor(tmp_path, scenario, batch=4, queue=1)


def test_the_rate_limit_refills():
    now = [0.0]
    limiter = RateLimiter(2.0, burst=3, clock=lambda: now[0])
    for _ in range(3):
        limiter.check("a")
    with pytest.raises(HttpError):
        limiter.check("a")
    limiter.check("b")
    now[0] += 0.5
    limiter.check("a")
    with pytest.raises(HttpError):
        limiter.check("a")

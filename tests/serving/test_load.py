# SPDX-License-Identifier: Apache-2.0
"""Many clients at once: every answer is the one a direct call gives. `make soak` does this for a minute."""

import asyncio

import httpx
import numpy as np
import pytest

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.runtime.segmenter import Segmenter
from internimage_deploy.runtime.serving import service
from internimage_deploy.runtime.serving.admission import RateLimiter
from internimage_deploy.runtime.serving.execution.batcher import Batcher
from internimage_deploy.runtime.serving.http import image_codec as pictures
from internimage_deploy.runtime.serving.http.app import create_app
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.settings import Batching, Limits, ModelSettings, Settings
from support import load
from support.served import Served, encoded, stripes
from support.tiny_models import picture


def samples(color_path, count=24):
    """Pictures of several sizes, all different, with the direct answers."""
    segmenter = Segmenter.load(color_path, threads=1)
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        colors = rng.permutation(np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 40, 10)]))
        height, width = [(40, 60), (64, 64), (33, 71)][number % 3]
        image = picture(height + number // 3, width, colors=tuple(map(tuple, colors)))[0]
        labels = segmenter(image).labels
        made.append(load.Sample(encoded(image), pictures.png(labels), labels))
    return made


def test_every_client_gets_the_answers_to_its_own_pictures(color_path, tmp_path):
    with Served(color_path, tmp_path, "--workers", "2", "--queue", "1000") as server:
        report = asyncio.run(load.run(server.port, samples(color_path), clients=60, each=12))
        assert report.wrong == []
        assert (report.identical, len(report.refused)) == (60 * 12, 0)
        assert server.metric("internimage_pictures_total") == 60 * 12
        assert server.metric("internimage_batch_size_count") < 60 * 12, "nothing ran together"


def test_overload_is_refused_and_the_rest_is_answered_right(color_path, tmp_path):
    with Served(color_path, tmp_path, "--queue", "4", "--batch", "2") as server:
        report = asyncio.run(load.run(server.port, samples(color_path), clients=60, each=3))
        assert report.wrong == []
        assert len(report.refused) > 0
        assert report.identical + len(report.refused) == 60 * 3
        assert server.metric("internimage_refused_total") == len(report.refused)


def card():
    given = TensorSpec("image", "uint8", ("batch", "height", "width", 3))
    answer = TensorSpec("logits", "float32", ("batch", 3, "h4", "w4"))
    return ModelCard("fake", ("a", "b", "c"), ((0, 0, 0),) * 3, given, answer)


class StuckEngine:
    """An engine whose network takes as long as a test wants."""

    def __init__(self, settings, _metrics):
        self.go = asyncio.Event()
        batching = settings.batching
        self.batcher = Batcher(self.run, size=batching.size, delay_s=0, queue=batching.queue)

    async def run(self, items):
        await self.go.wait()
        return [np.zeros(work.geometry.image, np.uint8) for work in items]

    async def start(self):
        return card()

    def alive(self):
        return True

    def refusal(self):
        return self.batcher.refusal()

    async def segment(self, work, deadline):
        return await self.batcher.submit(work, key=work.size, deadline=deadline)

    async def close(self):
        self.go.set()
        await self.batcher.close()


def with_stuck_engine(tmp_path, scenario, **limits):
    async def go():
        settings = Settings(
            ModelSettings(tmp_path / "none.onnx"),
            limits=Limits(**limits),
            batching=Batching(size=1, queue=3),
        )
        app = create_app(settings, StuckEngine)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
                await scenario(client, app.state.service.engine)

    asyncio.run(go())


async def fill(client, engine, count):
    data = stripes()[0]
    tasks = [asyncio.create_task(client.post("/v1/segment", content=data)) for _ in range(count)]
    while engine.batcher.waiting < count - 1:
        await asyncio.sleep(0.01)
    return tasks


def test_a_full_queue_refuses_before_the_body_is_read(tmp_path):
    async def scenario(client, engine):
        accepted = await fill(client, engine, 4)

        async def body():
            raise AssertionError("the body was read")
            yield b""

        for path in ("/v1/segment", "/v1/segment/batch", "/v2/models/model/infer"):
            refused = await client.post(path, content=body())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/readyz")).status_code == 200
        engine.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200] * 4

    with_stuck_engine(tmp_path, scenario)


@pytest.mark.parametrize("arrival_s", [60, 0.05], ids=["in time", "slow"])
def test_requests_still_being_sent_hold_places_but_not_for_long(tmp_path, monkeypatch, arrival_s):
    monkeypatch.setattr(service, "_ARRIVAL_S", arrival_s)

    async def scenario(client, engine):
        engine.go.set()
        data, started, sent = stripes()[0], asyncio.Semaphore(0), asyncio.Event()

        async def slow():
            yield data[:1]
            started.release()
            await sent.wait()
            yield data[1:]

        senders = [asyncio.create_task(client.post("/v1/segment", content=slow())) for _ in range(4)]
        for _ in senders:
            await started.acquire()
        if arrival_s == 60:
            answer = await client.post("/v1/segment", content=data)
            assert answer.status_code == 503
            assert "waiting already" in answer.json()["error"]
        else:
            while (await client.post("/v1/segment", content=data)).status_code != 200:
                await asyncio.sleep(0.05)
            assert not any(sender.done() for sender in senders)
        sent.set()
        assert [answer.status_code for answer in await asyncio.gather(*senders)] == [200] * 4

    with_stuck_engine(tmp_path, scenario)


def test_a_picture_that_waits_too_long_is_given_up(tmp_path):
    async def scenario(client, engine):
        data = stripes()[0]
        first = asyncio.create_task(client.post("/v1/segment", content=data))
        while not engine.batcher._running:
            assert not first.done()
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(client.post("/v1/segment", content=data)) for _ in range(2)]
        for other in others:
            answer = await other
            assert answer.status_code == 503
            assert "without a turn" in answer.json()["error"]
        engine.go.set()
        assert (await first).status_code == 200

    with_stuck_engine(tmp_path, scenario, deadline_s=2)


def test_batches_and_tensors_pass_the_queue_as_well(tmp_path):
    async def scenario(client, engine):
        engine.go.set()
        data = stripes()[0]
        files = [("images", ("a.png", data))] * 3
        assert len((await client.post("/v1/segment/batch", files=files)).json()["results"]) == 3
        tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 4, 4, 3], "data": [0] * 96}
        answer = await client.post("/v2/models/model/infer", json={"inputs": [tensor]})
        assert answer.json()["outputs"][0]["shape"] == [2, 4, 4]

    with_stuck_engine(tmp_path, scenario)


def test_the_rate_limit_refills():
    now = [0.0]
    limiter = RateLimiter(2.0, burst=3, clock=lambda: now[0])
    for _ in range(3):
        limiter.check("a")
    with pytest.raises(Refusal):
        limiter.check("a")
    limiter.check("b")
    now[0] += 0.5
    limiter.check("a")
    with pytest.raises(Refusal):
        limiter.check("a")

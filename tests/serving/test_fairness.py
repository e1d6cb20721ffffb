# SPDX-License-Identifier: Apache-2.0
"""What one client takes leaves something for the next: turns, places, memory, rate, the time of the event loop."""

import asyncio
import contextlib
import os
import traceback
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from test_attacks import post_as, send_until_closed
from test_costly_images import RGB, job, settled, with_decoders
from test_hostile import check_alive, connect, read_head, status
from test_load import with_gated_executor
from uvicorn.server import ServerState

from internimage_deploy.runtime.imaging.pipeline import NetworkImage
from internimage_deploy.runtime.imaging.preprocess import Geometry
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.serving.admission import MemoryBudget
from internimage_deploy.runtime.serving.execution import decoder as decoder_module
from internimage_deploy.runtime.serving.execution.batcher import Batcher
from internimage_deploy.runtime.serving.execution.executor import LocalExecutor
from internimage_deploy.runtime.serving.execution.turns import Turns
from internimage_deploy.runtime.serving.http import body
from internimage_deploy.runtime.serving.http.connection import Connections, limited_protocol
from internimage_deploy.runtime.serving.http.middleware import client_address
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.metrics import Metrics
from internimage_deploy.runtime.serving.settings import Limits, ModelSettings, Settings, client_of
from support.served import Served, encoded, stripes

MIB = 1 << 20
FAR = float("inf")


def order(requests, turns=None):
    """Clients in the order in which their requests (client, cost), all there from the start, are served."""
    turns = turns or Turns()
    waiting = [(turns.due(client, cost), number, client) for number, (client, cost) in enumerate(requests)]
    served = ""
    for due, _, client in sorted(waiting):
        turns.serve(due)
        served += client
    return served


def test_clients_take_turns():
    assert order([("a", 1)] * 5 + [("b", 1)] * 2 + [("c", 1)]) == "abcabaaa"


def test_what_a_request_costs_counts():
    assert order([("a", 3)] * 3 + [("b", 1)] * 6) == "abbbabbba"


def test_a_client_that_comes_later_neither_waits_for_the_first_nor_makes_it_wait_for_ever():
    turns = Turns()
    of_a = [turns.due("a", 1) for _ in range(10)]
    for due in of_a[:4]:
        turns.serve(due)
    served = sorted([(due, "a") for due in of_a[4:]] + [(turns.due("b", 1), "b") for _ in range(10)])
    assert [client for _, client in served][:5] == ["b", "a", "b", "a", "b"]


def test_a_request_that_was_not_served_costs_nothing():
    turns = Turns()
    for _ in range(3):
        turns.due("a", 5)
        turns.cancel("a", 5)
    assert order([("a", 1), ("b", 1)], turns) == "ab"


def test_clients_are_forgotten():
    turns = Turns()
    for number in range(20_000):
        turns.due(str(number), 1)
    assert len(turns._paid) <= 10_000


def test_the_network_takes_images_of_clients_in_turns():
    async def scenario():
        batches, gate = [], asyncio.Event()

        async def run(items):
            batches.append(items)
            await gate.wait()
            return items

        queue = Batcher(run, size=2, delay_s=0)
        waiting = [asyncio.ensure_future(queue.submit("first", key=1, deadline=FAR))]
        await settled(lambda: batches)
        for number in range(4):
            waiting.append(asyncio.ensure_future(queue.submit(f"a{number}", key=1, deadline=FAR, client="a")))
        await asyncio.sleep(0)
        waiting.append(asyncio.ensure_future(queue.submit("b0", key=1, deadline=FAR, client="b")))
        waiting.append(asyncio.ensure_future(queue.submit("c0", key=2, deadline=FAR, client="c")))
        await settled(lambda: queue.waiting == 6)
        gate.set()
        await asyncio.gather(*waiting)
        assert batches == [["first"], ["a0", "b0"], ["c0"], ["a1", "a2"], ["a3"]]

    asyncio.run(scenario())


def test_each_crop_counts_in_what_an_image_costs_the_network():
    """Each image of 32 crops of 32x32 costs as much as 32 images of that size."""
    served = []

    async def run(images):
        served.extend(len(image.pixels) for image in images)
        await asyncio.sleep(0)
        return images

    async def scenario():
        model = ModelSettings(Path("m.onnx"), LoadOptions(batch=1))
        executor = LocalExecutor(Settings(model), Metrics())
        executor._batcher._run = run

        def image(height, crops):
            geometry = Geometry((height, 32), (height, 32), (height, 32), (height, 32))
            return NetworkImage(np.zeros((height, 32, 3), np.uint8), geometry, crop_count=crops)

        slid = [executor.segment(image(32 * 32, 32), FAR, "a") for _ in range(3)]
        whole = [executor.segment(image(32, 1), FAR, "b") for _ in range(70)]
        await asyncio.gather(*slid, *whole)

    asyncio.run(scenario())
    assert served.index(1024) == 0
    second, third = (position for position, height in enumerate(served) if height == 1024 and position)
    assert second > 30
    assert third - second > 30


def test_decoders_take_images_of_clients_in_turns():
    async def scenario(pool):
        decoders = [await pool._acquire(job()) for _ in range(2)]
        seen = []

        async def decode(client):
            decoder = await pool._acquire(job(client=client))
            seen.append(client)
            await asyncio.sleep(0)
            pool._release(decoder, False)

        waiting = [asyncio.ensure_future(decode(client)) for client in "aaabbc"]
        await settled(lambda: len(pool._waiting) == 6)
        pool._release(decoders[0], False)
        await asyncio.gather(*waiting)
        assert "".join(seen) == "abcaba"
        pool._release(decoders[1], False)

    with_decoders(scenario)


@pytest.mark.skipif(os.name == "nt", reason="needs timers of CPU time")
def test_a_decoder_comes_back_when_its_job_is_cancelled_in_the_moment_of_its_turn():
    async def scenario(pool):
        waiting = asyncio.create_task(pool._acquire(job()))
        await asyncio.sleep(0)  # it has its turn, and does not know yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(pool._idle) == 2
        assert not pool._waiting

    with_decoders(scenario)


def test_an_image_that_is_slow_for_its_size_becomes_a_large_one(monkeypatch):
    """It is decoded all the same, and never in the process that is kept for small images."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)

    async def scenario(pool):
        before = {decoder._process.pid for decoder in pool._all}
        monkeypatch.setattr(decoder_module, "_SMALL_CPU_S", 0.001)
        slow = asyncio.ensure_future(pool.decode(job(image=noise)))
        await settled(lambda: pool._large_running == 1)
        np.testing.assert_array_equal(await slow, noise)
        assert len(before - {decoder._process.pid for decoder in pool._all}) == 1
        monkeypatch.undo()
        np.testing.assert_array_equal(await pool.decode(job()), RGB)

    with_decoders(scenario)


def test_one_client_cannot_take_every_place(tmp_path):
    async def scenario(client, executor):
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(client._transport.app, client=("10.0.0.2", 1)), base_url="http://test"
        ) as other:
            data = stripes()[0]
            greedy = [asyncio.create_task(client.post("/v1/segment", content=data)) for _ in range(30)]
            in_work = lambda: executor.batcher.running + executor.batcher.waiting  # noqa: E731
            await settled(lambda: in_work() + sum(task.done() for task in greedy) == 30)
            refused = [task.result() for task in greedy if task.done()]
            assert {response.status_code for response in refused} == {503}
            assert "too many of your images" in refused[0].json()["error"]
            held = in_work()
            modest = [asyncio.create_task(other.post("/v1/segment", content=data)) for _ in range(2)]
            await settled(lambda: in_work() == held + 2)
            executor.gate.set()
            assert {response.status_code for response in await asyncio.gather(*greedy, *modest)} == {200, 503}
            assert [task.result().status_code for task in modest] == [200, 200]

    with_gated_executor(tmp_path, scenario, queue=23)


def test_one_client_cannot_take_all_memory():
    budget = MemoryBudget(100)
    with contextlib.ExitStack() as held:
        for _ in range(7):
            held.enter_context(budget.share("a")).take(10)
        more = held.enter_context(budget.share("a"))
        with pytest.raises(HttpError, match="too many of your large images") as error:
            more.take(10)
        assert error.value.status == 503
        other = held.enter_context(budget.share("b"))
        other.take(30)
        with pytest.raises(HttpError, match="too many large images"):
            held.enter_context(budget.share("c")).take(1)
    with budget.share("a") as alone:
        alone.take(60)
        alone.take(40)
    assert budget.used == 0
    assert not budget._clients


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix", "unix"),
    ],
)
def test_a_network_of_ipv6_is_one_client(address, client):
    assert client_of(address) == client


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("192.0.2.1:4711", "192.0.2.1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("6.6.6.6, 192.0.2.1:4711, 10.0.0.2:80", "192.0.2.1"),
        ("192.0.2.1:port", "10.0.0.1"),
        ("[nonsense]:1", "10.0.0.1"),
        ("[]", "10.0.0.1"),
        (":80", "10.0.0.1"),
    ],
)
def test_proxies_may_append_the_port(forwarded, client):
    assert client_address("10.0.0.1", forwarded, Limits(proxies=("10.0.0.0/8",))) == client


def test_of_a_long_chain_of_proxies_only_the_end_counts():
    assert client_address("10.0.0.1", "192.0.2.1" + ", 10.0.0.2" * 31, Limits(proxies=("10.0.0.0/8",))) == "192.0.2.1"
    assert client_address("10.0.0.1", "192.0.2.1" + ", 10.0.0.2" * 6000, Limits(proxies=("10.0.0.0/8",))) == "10.0.0.2"


def test_the_rate_of_ipv6_counts_for_the_network(color_path, tmp_path):
    with Served(color_path, tmp_path, "--rate", "0.001", "--proxy", "127.0.0.1") as server:
        seen = [post_as(server, f"2001:db8::{number:x}:1") for number in range(25)]
        assert seen == [200] * 20 + [429] * 5
        assert post_as(server, "[2001:db8:0:1::1]:4711") == 200


def test_connections_of_ipv6_count_for_the_network():
    class Connection:
        aborted = False

        def in_request(self):
            return False

        def abort(self):
            self.aborted = True

    connections = Connections(Limits(connections=4))
    made = [Connection() for _ in range(4)]
    for number, connection in enumerate(made):
        connections.add(connection, f"2001:db8::{number}")
    assert [connection.aborted for connection in made] == [True, False, False, False]
    assert connections.count("2001:db8::9") == 3
    for number, connection in enumerate(made):
        connections.remove(connection, f"2001:db8::{number}")
    assert not connections.peers


@pytest.fixture(scope="module")
def guarded(color_path, tmp_path_factory):
    """A service that requires a token."""
    token = {"INTERNIMAGE_DEPLOY_TOKEN": "a-token-of-enough-characters"}
    with Served(color_path, tmp_path_factory.mktemp("guarded"), env=token) as running:
        yield running


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_a_long_body_without_the_token_is_not_read(guarded, framing):
    with connect(guarded) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        head = read_head(client)
        assert status(head) == 401
        assert b"connection: close" in head.lower()
        piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        assert send_until_closed(client, piece, 1000) < 32 * MIB


def test_a_short_body_without_the_token_leaves_the_connection_open(guarded):
    request = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)
    with connect(guarded) as client:
        client.sendall(request)
        assert b"connection: close" not in read_head(client).lower()
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in read_head(client)  # perhaps with the rest of the first response before it


def test_others_have_their_turn_while_a_form_is_parsed(server):
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    data = part + b"\r\n" * (2 * MIB) + b"\r\n--x--\r\n"
    headers = Headers({"content-type": "multipart/form-data; boundary=x"})
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scenario():
        counting = asyncio.ensure_future(count())
        (upload,) = await body._form_files(headers, bytearray(data), Limits())
        counting.cancel()
        assert upload.data == b"\r\n" * (2 * MIB)

    asyncio.run(scenario())
    assert turns >= 16
    form = {"files": {"a": ("a.png", encoded(RGB) + bytes(MIB))}}
    assert server.post("/v1/segment", **form).status_code == 200
    check_alive(server)


class Transport:
    """As much of a connection's transport as receiving takes."""

    def get_extra_info(self, _name):
        return None

    def is_closing(self):
        return False

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def close(self):
        pass

    def write(self, _data):
        pass


def test_others_have_their_turn_while_small_chunks_are_parsed():
    """A read may hold thousands of chunks; they are parsed in parts, and all of them."""
    chunks = 4000
    received = bytearray()

    async def app(_scope, receive, _send):
        more = True
        while more:
            message = await receive()
            received.extend(message["body"])
            more = message["more_body"]
        await asyncio.Event().wait()

    async def scenario():
        limits = Limits()
        config = uvicorn.Config(app, http=limited_protocol(limits, Connections(limits)), lifespan="off")
        config.load()
        connection = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
        connection.connection_made(Transport())
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.data_received(head + (b"40\r\n" + b"x" * 64 + b"\r\n") * chunks + b"0\r\n\r\n")
        turns = 0
        while len(received) < 64 * chunks:
            await asyncio.sleep(0)
            turns += 1
            assert turns < 100_000
        assert turns >= chunks // 300
        for task in list(connection.tasks):
            task.cancel()
        connection.connection_lost(None)

    asyncio.run(scenario())


def test_a_body_that_breaks_off_is_freed_at_once():
    # Whatever keeps the exception keeps the frames of its traceback; their body must not take memory with it.
    messages = [{"type": "http.request", "body": bytes(1 << 20), "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    budget = MemoryBudget(4 << 20)
    with budget.share() as share, pytest.raises(HttpError, match="the client went away") as error:
        asyncio.run(body.read_body(request, share, Limits()))
    assert budget.used == 0
    frames = (frame for frame, _ in traceback.walk_tb(error.value.__traceback__))
    bodies = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, bytearray)]
    assert bodies
    assert not any(bodies)

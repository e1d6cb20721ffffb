# SPDX-License-Identifier: Apache-2.0
"""What clients see when processes are killed, stopped or broken."""

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import onnx
import pytest

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline, NetworkImage
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.serving.execution import pool as pool_module
from internimage_deploy.runtime.serving.execution.pool import Pool
from internimage_deploy.runtime.serving.http_error import HttpError
from internimage_deploy.runtime.serving.settings import ModelSettings
from support.dead_gpu import DEADLY, SettingsOfADeadGpu
from support.served import WAIT_S, Served, decoded, encoded, stripes, until
from support.tiny_models import color_model


def in_work(server):
    """Images that wait or have started to run."""
    return server.metric("internimage_queue_pictures") + server.metric("internimage_batch_size_sum")


def test_killing_workers_under_load_loses_and_mixes_up_nothing(color_path, tmp_path):
    with Served(color_path, tmp_path, "--workers", "2", "--queue", "500", "--deadline", WAIT_S) as server:
        samples = [stripes(seed=seed) for seed in range(6)]
        first = server.workers()
        # A stopped worker keeps the batch it got, so that what is killed has images for sure.
        for pid in first:
            os.kill(pid, signal.SIGSTOP)

        def segment(number):
            data, labels = samples[number % len(samples)]
            response = server.post("/v1/segment", content=data)
            if response.status_code == 503:
                return int(response.headers["retry-after"]) >= 1
            assert response.status_code == 200, response.text
            np.testing.assert_array_equal(decoded(response.content), labels)
            return True

        with ThreadPoolExecutor(16) as clients:
            requests = [clients.submit(segment, number) for number in range(200)]
            until(lambda: server.metric("internimage_batch_size_count") == 2 and in_work(server) == 16, "load")
            os.kill(first[0], signal.SIGKILL)
            until(lambda: server.metric("internimage_worker_restarts_total") == 1, "the first replacement")
            os.kill(first[1], signal.SIGKILL)
            assert all(request.result(WAIT_S) for request in requests)
        until(lambda: server.get("/readyz").status_code == 200 and len(server.workers()) == 2, "recovery")
        assert not set(first) & set(server.workers())
        assert server.metric("internimage_worker_restarts_total") == 2
        assert all(segment(number) for number in range(6))


def test_without_a_worker_the_service_is_not_ready_and_comes_back(color_path, tmp_path):
    with Served(color_path, tmp_path) as server:
        (pid,) = server.workers()
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.get("/readyz").status_code == 503, "not ready")
        assert server.get("/healthz").status_code == 200
        until(lambda: server.get("/readyz").status_code == 200, "ready again")
        assert server.post("/v1/segment", content=stripes()[0]).status_code == 200


def test_sigterm_finishes_what_was_accepted_and_leaves_no_process(color_path, tmp_path):
    image = encoded(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    with Served(color_path, tmp_path, "--batch", "2", "--deadline", WAIT_S, "--drain", WAIT_S) as server:
        workers = server.workers()
        os.kill(workers[0], signal.SIGSTOP)
        with ThreadPoolExecutor(8) as clients:
            requests = [clients.submit(server.post, "/v1/segment", content=image) for _ in range(8)]
            until(lambda: in_work(server) == 8, "eight images in work")
            assert server.metric("internimage_queue_pictures") > 0
            os.kill(server.pid, signal.SIGTERM)
            until(lambda: refuses_connections(server), "the end of new connections")
            os.kill(workers[0], signal.SIGCONT)
            assert [request.result().status_code for request in requests] == [200] * 8
        assert server.process.wait(WAIT_S) == 0
        with pytest.raises(httpx.ConnectError):
            server.get("/healthz")
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the workers' end")


def refuses_connections(server):
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionError:
        return True
    return False


def test_workers_end_when_the_service_is_killed(color_path, tmp_path):
    with Served(color_path, tmp_path) as server:
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the workers' end")


def test_a_client_that_goes_away_frees_its_place(color_path, tmp_path):
    data = stripes()[0]
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with Served(color_path, tmp_path, "--batch", "1", "--deadline", WAIT_S) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(server.post, "/v1/segment", content=data)
            until(lambda: server.metric("internimage_batch_size_count") == 1, "a batch that holds the worker")
            clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
            for client in clients:
                client.sendall(head + data)
            until(lambda: server.metric("internimage_queue_pictures") == 5, "queue")
            for client in clients:
                client.close()
            until(lambda: server.metric("internimage_queue_pictures") == 0, "an empty queue")
            os.kill(worker, signal.SIGCONT)
            assert first.result().status_code == 200
        assert server.metric("internimage_batch_size_count") == 1


def test_before_the_model_is_loaded_requests_get_a_time_to_come_back(color_path, tmp_path):
    # Python reads this file at its start; workers wait in it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        f"while '--multiprocessing-fork' in sys.orig_argv and not os.path.exists({str(tmp_path / 'go')!r}):\n"
        "    time.sleep(0.02)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with Served(color_path, tmp_path, env={"PYTHONPATH": path}, wait=False) as server:
        server.wait_listening()
        assert server.get("/readyz").status_code == 503
        early = server.post("/v1/segment", content=stripes()[0])
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) >= 1
        (tmp_path / "go").touch()
        server.wait_ready()
        assert server.post("/v1/segment", content=stripes()[0]).status_code == 200


def serve(*arguments):
    command = [sys.executable, "-m", "internimage_deploy", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)


def test_a_model_that_cannot_be_loaded_ends_the_service_with_the_reason(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    result = serve(tmp_path / "broken.onnx", "--port", "0")
    assert result.returncode == 1
    assert "not an ONNX file" in result.stderr
    assert "Traceback" not in result.stderr
    assert "listening" not in result.stderr  # the file itself shows what is wrong, before any worker starts


def test_a_model_that_a_worker_cannot_load_ends_the_service_with_the_reason(tmp_path):
    path = color_model(tmp_path / "operator.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    result = serve(path, "--port", "0", "--backend", "onnxruntime")
    assert result.returncode == 1
    assert "NoSuchOperator" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_reported(server, color_path):
    result = serve(color_path, "--port", server.port)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in result.stderr


@pytest.mark.parametrize("token", ["short", "with spaces in between", "non-ascii-tökën-of-length", ""])
def test_a_weak_token_is_rejected(color_path, tmp_path, token):
    (tmp_path / "token").write_text(token)
    result = serve(color_path, "--token-file", tmp_path / "token")
    assert result.returncode == 1
    assert "at least 16" in result.stderr
    assert len(token) < 6 or token not in result.stderr


def with_pool(color_path, scenario, side=32, settings=ModelSettings):
    async def go():
        model = settings(color_path, LoadOptions(threads=1, batch=4))
        pool = Pool(model, count=1, run_s=WAIT_S)
        try:
            card = await pool.start()
            assert isinstance(card, ModelCard)
            prepared = ImagePipeline(card).prepare(np.full((side, side, 3), 9, np.uint8))
            await scenario(pool, prepared.for_network())
        finally:
            await pool.close()

    asyncio.run(go())


def worker_pids():
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.parametrize("side", [32, 640], ids=["3 kB", "1.2 MB, which blocks the pipe"])
def test_a_worker_that_hangs_is_replaced_and_its_images_fail(side, color_path, monkeypatch):
    # Every replacement is late, so that the second attempt finds no worker.
    monkeypatch.setattr(pool_module, "_SHORT_LIFE_S", float("inf"))

    async def scenario(pool, image):
        (before,) = worker_pids()
        os.kill(before, signal.SIGSTOP)
        pool._run_s = 0.3
        (error,) = await pool.run([image])
        assert isinstance(error, HttpError)
        assert error.status == 503
        pool._run_s = WAIT_S
        (labels,) = await pool.run([image])
        assert labels.shape == (side, side)
        assert before not in worker_pids()

    with_pool(color_path, scenario, side=side)


def test_images_of_a_dead_worker_run_again(color_path):
    async def scenario(pool, image):
        (before,) = worker_pids()
        os.kill(before, signal.SIGSTOP)
        running = asyncio.ensure_future(pool.run([image, image, image]))
        while not pool._idle.empty():  # until the worker has the images
            await asyncio.sleep(0)
        os.kill(before, signal.SIGKILL)
        results = await running
        assert [labels.shape for labels in results] == [(32, 32)] * 3

    with_pool(color_path, scenario)


def test_a_worker_whose_gpu_is_dead_ends_and_is_replaced(color_path):
    """After an error such as an illegal memory access, no call to the GPU succeeds any more in that process."""

    async def scenario(pool, image):
        (before,) = worker_pids()
        deadly = NetworkImage(np.full_like(image.pixels, DEADLY), image.geometry)
        first, error, last = await pool.run([image, deadly, image])
        assert (first.shape, last.shape) == ((32, 32), (32, 32))
        assert isinstance(error, HttpError)
        assert error.status == 503
        assert before not in worker_pids()

    with_pool(color_path, scenario, settings=SettingsOfADeadGpu)


def test_an_error_of_one_image_is_not_the_batchs(color_path):
    async def scenario(pool, image):
        broken = NetworkImage(image.pixels[:, :, :2], image.geometry)
        results = await pool.run([image, broken, image])
        assert [getattr(result, "shape", type(result)) for result in results] == [(32, 32), UserError, (32, 32)]

    with_pool(color_path, scenario)

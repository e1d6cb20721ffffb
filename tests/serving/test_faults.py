# SPDX-License-Identifier: Apache-2.0
"""What is killed, stopped or broken, and what clients see of it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from internimage_deploy.card import ModelCard
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline, NetworkImage
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.serving.execution.pool import Pool
from internimage_deploy.runtime.serving.http_error import Refusal
from internimage_deploy.runtime.serving.settings import ModelSettings
from support.served import Served, decoded, encoded, stripes

WAIT_S = 60


def until(condition, what):
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen in {WAIT_S} s"
        time.sleep(0.02)


def test_killing_workers_under_load_loses_and_mixes_up_nothing(color_path, tmp_path):
    with Served(color_path, tmp_path, "--workers", "2", "--queue", "500") as server:
        samples = [stripes(seed=seed) for seed in range(6)]
        first = set(server.workers())

        def ask(number):
            data, labels = samples[number % len(samples)]
            answer = server.post("/v1/segment", content=data)
            if answer.status_code == 503:
                return int(answer.headers["retry-after"]) >= 1
            assert answer.status_code == 200, answer.text
            np.testing.assert_array_equal(decoded(answer.content), labels)
            return True

        with ThreadPoolExecutor(16) as clients:
            answers = [clients.submit(ask, number) for number in range(200)]
            until(lambda: sum(answer.done() for answer in answers) > 50, "load")
            for pid in first:
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            assert all(answer.result(WAIT_S) for answer in answers)
        until(lambda: server.get("/readyz").status_code == 200 and len(server.workers()) == 2, "recovery")
        assert not first & set(server.workers())
        assert server.metric("internimage_worker_restarts_total") == 2
        assert all(ask(number) for number in range(6))


def test_without_a_worker_the_service_is_not_ready_and_comes_back(color_path, tmp_path):
    with Served(color_path, tmp_path) as server:
        (pid,) = server.workers()
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.get("/readyz").status_code == 503, "not ready")
        assert server.get("/healthz").status_code == 200
        until(lambda: server.get("/readyz").status_code == 200, "ready again")
        assert server.post("/v1/segment", content=stripes()[0]).status_code == 200


def test_sigterm_answers_what_was_accepted_and_leaves_no_process(color_path, tmp_path):
    big = encoded(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8))
    with Served(color_path, tmp_path, "--delay", "800", "--batch", "64") as server:
        workers = server.workers()
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(server.post, "/v1/segment", content=big) for _ in range(8)]
            until(lambda: server.metric("internimage_queue_pictures") == 8, "queue")
            os.kill(server.pid, signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200] * 8
        assert server.process.wait(WAIT_S) == 0
        with pytest.raises(httpx.ConnectError):
            server.get("/healthz")
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the workers' end")


def test_workers_end_when_the_service_is_killed(color_path, tmp_path):
    with Served(color_path, tmp_path) as server:
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the workers' end")


def test_a_client_that_goes_away_frees_its_place(color_path, tmp_path):
    data = stripes()[0]
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with Served(color_path, tmp_path, "--delay", "5000", "--batch", "64") as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        for client in clients:
            client.sendall(head + data)
        until(lambda: server.metric("internimage_queue_pictures") == 5, "queue")
        for client in clients:
            client.close()
        until(lambda: server.metric("internimage_queue_pictures") == 0, "an empty queue")
        assert server.metric("internimage_batch_size_count") == 0


def test_before_the_model_is_loaded_requests_are_told_to_wait(color_path, tmp_path):
    # Python reads this file at its start; workers wait in it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        f"while '--multiprocessing-fork' in sys.orig_argv and not os.path.exists({str(tmp_path / 'go')!r}):\n"
        "    time.sleep(0.02)\n"
    )
    with Served(color_path, tmp_path, env={"PYTHONPATH": str(tmp_path)}, wait=False) as server:
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


def test_a_taken_port_is_reported(server, color_path):
    result = serve(color_path, "--port", server.port)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in result.stderr


@pytest.mark.parametrize("token", ["short", "with spaces in between", "non-ascii-tökën-of-length", ""])
def test_a_weak_token_is_refused(color_path, tmp_path, token):
    (tmp_path / "token").write_text(token)
    result = serve(color_path, "--token-file", tmp_path / "token")
    assert result.returncode == 1
    assert "at least 16" in result.stderr
    assert len(token) < 6 or token not in result.stderr


def pooled(color_path, scenario, side=32, **options):
    async def go():
        pool = Pool(
            ModelSettings(color_path, LoadOptions(threads=1)), **{"count": 1, "batch": 4, "run_s": 60.0, **options}
        )
        try:
            card = await pool.start()
            assert isinstance(card, ModelCard)
            prepared = ImagePipeline(card).prepare(np.full((side, side, 3), 9, np.uint8))
            await scenario(pool, prepared.for_network())
        finally:
            await pool.close()

    asyncio.run(go())


@pytest.mark.parametrize("side", [32, 640], ids=["3 kB", "1.2 MB, which blocks the pipe"])
def test_a_worker_that_hangs_is_replaced_and_its_work_reported_failed(side, color_path):
    async def scenario(pool, work):
        (before,) = pool.pids
        os.kill(before, signal.SIGSTOP)
        pool._run_s = 0.3
        (answer,) = await pool.run([work])
        assert isinstance(answer, Refusal)
        assert answer.status == 503
        pool._run_s = 60.0
        (answer,) = await pool.run([work])
        assert answer.shape == (side, side)
        assert before not in pool.pids

    pooled(color_path, scenario, side=side)


def test_work_of_a_dead_worker_runs_again(color_path):
    async def scenario(pool, work):
        (before,) = pool.pids
        os.kill(before, signal.SIGSTOP)
        running = asyncio.ensure_future(pool.run([work, work, work]))
        await asyncio.sleep(0.2)
        os.kill(before, signal.SIGKILL)
        answers = await running
        assert [answer.shape for answer in answers] == [(32, 32)] * 3

    pooled(color_path, scenario)


def test_an_error_of_one_picture_is_not_the_batchs(color_path):
    async def scenario(pool, work):
        broken = NetworkImage(work.pixels[:, :, :2], work.geometry)
        answers = await pool.run([work, broken, work])
        assert [getattr(answer, "shape", type(answer)) for answer in answers] == [(32, 32), RuntimeError, (32, 32)]

    pooled(color_path, scenario)

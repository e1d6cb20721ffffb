# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this machine, each with processes of its own: serving, and segmenting a folder."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_load import samples

from internimage_deploy import Segmenter
from internimage_deploy.window import Window
from support import load
from support.served import WAIT_S, decoded, encoded, stripes, until
from support.tiny_models import color_model

pytest.importorskip("ray", reason="pip install 'ray[data,serve]'")
pytestmark = pytest.mark.slow


# The cluster lives in a process of its own: when one of Ray's dies, Ray ends the process that started it.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
# A busy machine keeps Ray's processes from answering each other for longer than they wait by default.
PATIENCE = {
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def start_cluster(log_path):
    """The process of a cluster and its address; None for the address if it did not start."""
    environment = {**os.environ, **PATIENCE}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
    until(lambda: process.poll() is not None or "address " in log_path.read_text(errors="replace"), "a cluster")
    found = [
        line.split()[1] for line in log_path.read_text(errors="replace").splitlines() if line.startswith("address ")
    ]
    return process, found[0] if found else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    for attempt in range(3):  # Ray gives its processes a time to start, which a busy machine may not keep
        process, address = start_cluster(folder / f"{attempt}.log")
        if address is not None:
            break
    assert address is not None, (folder / "2.log").read_text(errors="replace")
    yield address
    process.stdin.close()
    process.wait(WAIT_S)


def command(*arguments):
    return [sys.executable, "-m", "internimage_deploy", *map(str, arguments)]


def ray_processes(name):
    """Process ids of the Ray actors of a class."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::") and name in title:
                found.append(int(folder.name))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def port():
    """Ray Serve keeps the port that it was started with on a cluster."""
    return free_port()


@contextlib.contextmanager
def serving(cluster, port, model, folder, *options):
    """`serve --engine ray` on the cluster, or for None on one that the command starts; its address."""
    log_path = folder / "serve.log"
    options = (*options, *(() if cluster is None else ("--ray-address", cluster, "--replicas", 2)))
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command("serve", model, "--engine", "ray", "--port", port, "--cpus", 0.5, "--threads", 1, *options),
            stdout=log, stderr=log, env={**os.environ, **PATIENCE},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready():
        assert process.poll() is None, log_path.read_text()
        return f"listening on {url}" in log_path.read_text() and httpx.get(f"{url}/readyz").status_code == 200

    until(ready, "readiness")
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    assert not is_served(url), "the application is still there"


@pytest.fixture
def served(cluster, port, color_path, tmp_path):
    with serving(cluster, port, color_path, tmp_path) as url:
        yield url


def is_served(url):
    try:
        return httpx.get(f"{url}/healthz", timeout=WAIT_S).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_same_application_on_ray_serve_survives_the_loss_of_a_replica(served, color_path):
    data, labels = stripes()
    response = httpx.post(f"{served}/v1/segment", content=data, timeout=WAIT_S)
    np.testing.assert_array_equal(decoded(response.content), labels)
    assert "default-src 'none'" in httpx.get(f"{served}/").headers["content-security-policy"]
    assert httpx.post(f"{served}/v1/segment", content=b"x").status_code == 400
    assert httpx.post(f"{served}/v1/segment", content=bytes(40 << 20), timeout=WAIT_S).status_code == 413
    assert httpx.get(f"{served}/v2/models/color").json()["outputs"][0]["name"] == "labels"

    replicas = ray_processes("internimage:Model")
    assert len(replicas) == 2

    def kill():
        time.sleep(1)  # any moment under load will do
        os.kill(replicas[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = asyncio.run(load.run(int(served.rpartition(":")[2]), samples(color_path), clients=12, each=40))
    killer.join()
    assert report.wrong == []
    assert report.identical > 12
    until(lambda: len(set(ray_processes("internimage:Model")) - {replicas[0]}) >= 2, "a new replica")
    # The new replica may still be loading the model, which the service says with 503.
    answers = []
    until(lambda: answers.append(httpx.post(f"{served}/v1/segment", content=data, timeout=WAIT_S))
          or answers[-1].status_code == 200, "a result")  # fmt: skip
    np.testing.assert_array_equal(decoded(answers[-1].content), labels)


def test_the_rate_cannot_be_evaded_by_a_header_on_ray_either(color_path, tmp_path):
    with serving(None, free_port(), color_path, tmp_path, "--rate", "0.001") as url:
        headers = [{"X-Forwarded-For": f"10.0.{number}.1"} for number in range(60)]
        seen = [httpx.get(f"{url}/v2", headers=header, timeout=WAIT_S).status_code for header in headers]
        assert seen == [200] * 20 + [429] * 40


def test_a_folder_is_segmented_once_whatever_breaks(cluster, color_path, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "deep").mkdir(parents=True)
    expected = {}
    for seed in range(40):
        stem = f"deep/{seed}" if seed % 3 == 0 else str(seed)
        data, expected[stem] = stripes(40 + seed, 64, seed=seed)
        (images / f"{stem}.png").write_bytes(data)
    (images / "broken.png").write_bytes(b"no image")
    run = command("segment", color_path, images, "-o", out.as_uri(), "--recursive", "--json", "--executor", "ray",
                  "--skip-existing", "--ray-address", cluster, "--replicas", 2, "--cpus", 0.5,
                  "--threads", 1)  # fmt: skip

    done = out / "1.labels.png"
    out.mkdir()
    done.write_bytes(b"done already")
    (out / "1.json").write_text("{}")  # both files that are asked for
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = []

    def started():
        assert process.poll() is None, process.communicate()
        workers[:] = ray_processes("MapWorker")
        return workers

    until(started, "a worker")
    os.kill(workers[0], signal.SIGKILL)
    text, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, errors
    assert "segmented 39 of 40 images" in text
    assert "1 was there already" in text
    assert "broken.png" in errors
    assert done.read_bytes() == b"done already"
    (failure,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert failure["source"].endswith("broken.png")
    for stem, labels in expected.items():
        if stem != "1":
            np.testing.assert_array_equal(decoded((out / f"{stem}.labels.png").read_bytes()), labels)
            assert json.loads((out / f"{stem}.json").read_text())["height"] == labels.shape[0]

    (images / "broken.png").unlink()
    again = subprocess.run(run, capture_output=True, text=True, timeout=WAIT_S)
    assert again.returncode == 0, again.stderr
    assert "segmented 0 of 0 images" in again.stdout
    assert "40 were there already" in again.stdout


def test_a_model_with_a_window_is_slid_on_a_cluster(cluster, port, tmp_path):
    """Of a file that returns labels, by `serve` and by `segment`, with the labels of this machine."""
    model = color_model(tmp_path / "m.onnx", labels=True, window=Window((32, 32), (16, 24)))
    images = np.random.default_rng(1).integers(0, 256, (3, 80, 112, 3), np.uint8)
    expected = [result.labels for result in Segmenter.load(model)(list(images))]
    assert (expected[0] != Segmenter.load(model, window="whole")(images[0]).labels).any()
    (tmp_path / "images").mkdir()
    with serving(cluster, port, model, tmp_path) as url:
        for index, image in enumerate(images):
            (tmp_path / "images" / f"{index}.png").write_bytes(encoded(image))
            response = httpx.post(f"{url}/v1/segment", content=encoded(image), timeout=WAIT_S)
            np.testing.assert_array_equal(decoded(response.content), expected[index])
    run = command("segment", model, tmp_path / "images", "-o", tmp_path / "out", "--executor", "ray", "--ray-address",
                  cluster, "--cpus", 0.5, "--threads", 1)  # fmt: skip
    subprocess.run(run, check=True, timeout=WAIT_S)
    for index, labels in enumerate(expected):
        np.testing.assert_array_equal(decoded((tmp_path / "out" / f"{index}.labels.png").read_bytes()), labels)


def test_evaluation_counts_on_a_cluster_as_on_one_machine(cluster, color_path, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        (tmp_path / "images" / f"{index}.png").write_bytes(encoded(rng.integers(0, 256, (32, 40, 3), np.uint8)))
        (tmp_path / "labels" / f"{index}.png").write_bytes(encoded(rng.integers(0, 3, (32, 40), np.uint8)))
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    found = {}
    for name, options in {
        "here": (),
        "cluster": ("--executor", "ray", "--ray-address", cluster, "--replicas", 2, "--cpus", 0.5),
    }.items():
        # The folders are named as from here: the cluster's processes run elsewhere.
        done = subprocess.run(
            command("evaluate", color_path, "--images", "images", "--labels", "labels", "--backend", "onnxruntime",
                    "--threads", 1, "--flip", "--json", f"{name}.json", *options),
            capture_output=True, text=True, cwd=tmp_path, timeout=WAIT_S, env={**os.environ, **PATIENCE},
        )  # fmt: skip
        assert (done.returncode, "1 of 40 images could not be evaluated" in done.stderr) == (1, True), done.stderr
        found[name] = json.loads((tmp_path / f"{name}.json").read_text()) | {"images_per_second": None, "failed": None}
        assert len((tmp_path / f"{name}.images.jsonl").read_text().splitlines()) == 40
    assert found["cluster"] == found["here"]
    assert found["here"]["images"] == 39


def test_a_result_that_cannot_be_written_ends_the_run_with_the_reason(cluster, color_path, tmp_path):
    (tmp_path / "a.png").write_bytes(stripes()[0])
    (tmp_path / "out" / "a.labels.png").mkdir(parents=True)
    run = command("segment", color_path, tmp_path / "a.png", "-o", tmp_path / "out", "--executor", "ray",
                  "--ray-address", cluster, "--cpus", 0.5, "--threads", 1)  # fmt: skip
    result = subprocess.run(run, capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 1
    assert "a.labels.png: it is a folder; name a file" in result.stderr


def serve_on_ray(*arguments):
    return subprocess.run(command("serve", *arguments, "--executor", "ray"), capture_output=True, text=True)


@pytest.mark.parametrize("content", [None, b"no model"], ids=["missing", "damaged"])
def test_a_model_file_is_checked_before_ray_is_started(content, tmp_path):
    path = tmp_path / "model.onnx"
    if content:
        path.write_bytes(content)
    # No cluster is at that address: what is said about the file was found before it was tried.
    result = serve_on_ray(path, "--ray-address", "127.0.0.1:1")
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*model\.onnx.*\n", result.stderr)


def test_another_port_than_the_one_that_ray_keeps_is_an_error(served, cluster, port, color_path):
    result = serve_on_ray(color_path, "--ray-address", cluster, "--port", free_port())
    assert result.returncode == 1
    assert f"on 127.0.0.1:{port}, and keeps that address" in result.stderr
    assert is_served(served)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a.png", "-o", "out", "--replicas", "2"], 2, "add --executor ray"),
        (["nowhere://x/y", "-o", "out", "--engine", "ray"], 1, "not a location that can be opened"),
        (["clip.mp4", "-o", "out", "--engine", "ray"], 2, "videos are segmented on one machine"),
        ([".", "-o", "out", "--engine", "ray"], 1, "no image here"),
        ([".", "-o", "out", "--engine", "ray", "--replicas", "4-2"], 2, "expected a number or a range"),
    ],
    ids=[
        "option without a cluster",
        "unknown store",
        "video",
        "no image",
        "replicas",
    ],
)
def test_wrong_usage_is_reported(color_path, tmp_path, arguments, code, words):
    result = subprocess.run(command("segment", color_path, *arguments), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert re.search(words, " ".join(result.stderr.split()))

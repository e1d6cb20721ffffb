# SPDX-License-Identifier: Apache-2.0
"""`internimage-deploy serve` in a process of its own, and images to send to it."""

import contextlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from support.tiny_models import picture

WAIT_S = 240
"""After so many seconds a test fails instead of waiting on; no test is about this time."""


def until(condition, what):
    """Wait until `condition()` holds; `what` says in the failure what did not happen."""
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen in {WAIT_S} s"
        time.sleep(0.02)


class Served:
    """A running service; `url` is its address.

    `audited` runs it under a hook that lists every file that it and its processes open; `open_files` is its soft limit
    of them.
    """

    def __init__(self, model, folder, *options, env=None, audited=False, open_files=None, wait=True):
        self.log_path = Path(folder) / "server.log"
        self.opened_path = Path(folder) / "opened.txt"
        command = [sys.executable, "-m", "internimage_deploy", "serve", str(model), "--port", "0", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        if audited:
            path = [str(Path(__file__).with_name("audit")), *filter(None, [environment.get("PYTHONPATH")])]
            environment |= {"PYTHONPATH": os.pathsep.join(path), "AUDITED_FILES": str(self.opened_path)}
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = open_files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard)))
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=limit)
        # Certificates are not needed, and reading them for every request takes longer than most requests. A
        # connection for each request, because the service closes idle ones when it likes.
        self.client = httpx.Client(
            verify=False, timeout=WAIT_S, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self.url = self.port = None
        if wait:
            self.wait_ready()

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self):
        return self.process.pid

    def wait_listening(self):
        def listening():
            assert self.process.poll() is None, f"the service did not start:\n{self.log}"
            return re.search(r"listening on (http://[\d.]+:(\d+))", self.log)

        until(listening, "the start of the service")
        found = listening()
        self.url, self.port = found[1], int(found[2])

    def wait_ready(self):
        def ready():
            assert self.process.poll() is None, f"the service did not become ready:\n{self.log}"
            return self.get("/readyz").status_code == 200

        self.wait_listening()
        until(ready, "readiness")

    def get(self, path, **options):
        return self.client.get(self.url + path, **options)

    def post(self, path, **options):
        return self.client.post(self.url + path, **options)

    def metric(self, name):
        """The sum of a metric's samples."""
        lines = re.findall(rf"^{name}(?:{{[^}}]*}})? ([\d.e+-]+)$", self.get("/metrics").text, re.MULTILINE)
        return sum(map(float, lines))

    def workers(self):
        """Process ids of the worker processes."""
        return self._children(b"spawn_main")

    def decoders(self):
        """Process ids of the processes that decode images."""
        return self._children(b"decode_process")

    def _children(self, part):
        tasks = Path(f"/proc/{self.pid}/task")
        pids = set()
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):  # the thread has just ended
                pids |= set(map(int, (task / "children").read_text().split()))
        return [pid for pid in sorted(pids) if part in _command_line(pid)]

    def resident_bytes(self, *pids):
        """Memory of these processes; by default of the service, its workers and its decoders."""
        pages = 0
        for pid in pids or (self.pid, *self.workers(), *self.decoders()):
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self):
        """CPU time so far of the service's own process, and of its workers together."""

        def spent(pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        return spent(self.pid), sum(map(spent, self.workers()))

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(WAIT_S)
        finally:
            self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()
        self.client.close()


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def encoded(image, kind="PNG", **options):
    """An (H, W, 3) array as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    """The array in a PNG."""
    return np.asarray(Image.open(io.BytesIO(data)))


def stripes(height=48, width=64, seed=0):
    """An image of three stripes in an order that `seed` chooses; (bytes of a PNG, the labels it must get)."""
    order = np.random.default_rng(seed).permutation(3)
    colors = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)])[order]
    image, stripe = picture(height, width, colors=tuple(map(tuple, colors)))
    return encoded(image), order.astype(np.uint8)[stripe]

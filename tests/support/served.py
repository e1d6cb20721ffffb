# SPDX-License-Identifier: Apache-2.0
"""`internimage-deploy serve` in a process of its own, and pictures to send to it."""

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

STARTUP_S = 60


class Served:
    """A running service; `url` is where.

    `audited` runs it under a hook that lists every file it opens; `open_files` is its soft limit of them.
    """

    def __init__(self, model, folder, *options, env=None, audited=False, open_files=None, wait=True):
        self.log_path = Path(folder) / "server.log"
        self.opened_path = Path(folder) / "opened.txt"
        start = (
            [str(Path(__file__).with_name("audited.py")), str(self.opened_path)]
            if audited
            else ["-m", "internimage_deploy"]
        )
        command = [sys.executable, *start, "serve", str(model), "--port", "0", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = open_files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard)))
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=limit)
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
        give_up = time.monotonic() + STARTUP_S
        while time.monotonic() < give_up and self.process.poll() is None:
            if found := re.search(r"listening on (http://[\d.]+:(\d+))", self.log):
                self.url, self.port = found[1], int(found[2])
                return
            time.sleep(0.05)
        raise AssertionError(f"the service did not start:\n{self.log}")

    def wait_ready(self):
        self.wait_listening()
        give_up = time.monotonic() + STARTUP_S
        while time.monotonic() < give_up:
            if self.get("/readyz").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"the service did not become ready:\n{self.log}")

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=30, **options)

    def metric(self, name):
        """The sum of a metric's samples."""
        lines = re.findall(rf"^{name}(?:{{[^}}]*}})? ([\d.e+-]+)$", self.get("/metrics").text, re.MULTILINE)
        return sum(map(float, lines))

    def workers(self):
        """Process ids of the worker processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        pids = {
            int(pid) for task in children.parent.parent.iterdir() for pid in (task / "children").read_text().split()
        }
        return [pid for pid in sorted(pids) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def resident_bytes(self):
        """Memory of the service and its workers."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.pid, *self.workers())]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self):
        """CPU time so far of the service's front, and of its workers together."""

        def spent(pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        return spent(self.pid), sum(map(spent, self.workers()))

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()


def encoded(image, kind="PNG", **options):
    """An (H, W, 3) array as the bytes of a picture file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    """The array in a PNG."""
    return np.asarray(Image.open(io.BytesIO(data)))


def stripes(height=48, width=64, seed=0):
    """A picture of three stripes in an order that `seed` chooses; (bytes of a PNG, labels it must get)."""
    order = np.random.default_rng(seed).permutation(3)
    colors = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)])[order]
    image, stripe = picture(height, width, colors=tuple(map(tuple, colors)))
    return encoded(image), order.astype(np.uint8)[stripe]

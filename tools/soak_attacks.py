# SPDX-License-Identifier: Apache-2.0
"""Attacks on the service, bounded in bytes and time, and what healthy clients and the memory see of each."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support import attacks, load
from support.served import Served, stripes

CLIENTS = 4
ANSWER_S = 60.0
PAUSE_S = 0.05
MAX_MEMORY = 1024
HEALTHY_MS = 1000

Attack = Callable[[int], str]
"""One go of one client at a port; returns what came of it."""


def _connect(port: int, timeout_s: float = ANSWER_S) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout_s, source_address=("127.0.0.2", 0))


def sent(request: bytes, *, repeat: int = 1) -> Attack:
    """Send a request, or a start of one and `repeat` times its last 10 kB, and read the status of the response."""

    def go(port: int) -> str:
        with _connect(port) as connection:
            with contextlib.suppress(OSError):  # closed already: the response is still to be read
                connection.sendall(request)
                for _ in range(repeat - 1):
                    connection.sendall(request[-10_000:])
            received = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    received = received or piece[:12]
                    if received[9:12] != b"200":
                        break
            return received[9:12].decode() or "closed"

    return go


def unread(request: bytes) -> Attack:
    """Send a request again and again on one connection, for a second, and read nothing."""

    def go(port: int) -> str:
        with _connect(port, 1) as connection:
            give_up = time.monotonic() + 1
            with contextlib.suppress(OSError):
                while time.monotonic() < give_up:
                    connection.sendall(request * 1000)
        return "unread"

    return go


def stalled(start: bytes, number: int) -> Attack:
    """Send the start of a request on several connections, and hold them for three seconds."""

    def go(port: int) -> str:
        with contextlib.ExitStack() as stack:
            for _ in range(number):
                with contextlib.suppress(OSError):  # rejected already
                    stack.enter_context(_connect(port)).sendall(start)
            time.sleep(3)
        return "held"

    return go


def together(attack: Attack, number: int) -> Attack:
    """`attack` so many times at once; the outcome is that of each, counted."""

    def go(port: int) -> str:
        with ThreadPoolExecutor(number) as pool:
            outcomes = Counter(pool.map(lambda _: attack(port), range(number)))
        return ", ".join(f"{count} x {outcome}" for outcome, count in sorted(outcomes.items()))

    return go


def idle(number: int) -> Attack:
    """Hold connections for a second."""

    def go(port: int) -> str:
        with contextlib.ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(_connect(port))
            time.sleep(1)
        return "held"

    return go


def all_attacks() -> Iterator[tuple[str, Attack]]:
    """Names and attacks; the files are made when they are due."""
    close = "Connection: close"

    def image(body: bytes, query: str = "") -> Attack:
        return sent(attacks.post(f"/v1/segment{query}", body, close))

    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    yield "header lines", sent(get + b"x:y\r\n" * 2000, repeat=1000)
    yield "a header value", sent(get + b"x: " + b"y" * 10_000, repeat=1000)
    yield "commas to accept", sent(get + b"Accept: " + b"," * 60_000 + b"\r\nConnection: close\r\n\r\n")
    yield "pipelined, unread", unread(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
    yield "idle connections", idle(300)
    chunked = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield "chunks of 6 bytes", together(sent(chunked + b"6\r\nxxxxxx\r\n" * 2000, repeat=1000), 4)
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 32000000\r\n\r\n"
    yield "bodies of 31 MB that stay away", stalled(head + bytes(31_000_000), 12)
    yield "60 images of 3.9 MP at once", together(image(attacks.rgba_png(1950, 2000)), 15)
    yield "JPEG of 25,000 scans", image(attacks.progressive_jpeg(4992, 25_000))
    yield "JPEG of 100 scans", image(attacks.progressive_jpeg(4992, 100))
    yield "Exif segments, 32 MB", image(attacks.jpeg_with(attacks.EXIF * 2_900_000))
    yield "JPEG segments, 32 MB", image(attacks.jpeg_with(attacks.segment(0xE9, b"") * 8_000_000))
    yield "PNG chunks, 32 MB", image(attacks.png_with(attacks.chunk(b"prVt", b"") * 2_700_000))
    yield "GIF comments, 32 MB", image(attacks.gif_with(b"!\xfe\1a\0" * 6_400_000))
    yield "run-length BMP", image(attacks.run_length_bmp(1400))
    yield "16-bit PNG of 25 MP, overlay", image(attacks.grey16_png(5000, 5000), "?view=overlay")
    yield "RGBA PNG of 25 MP, overlay", image(attacks.rgba_png(5000, 5000), "?view=overlay")
    yield "1-bit PNG of 60000x400, overlay", image(attacks.bilevel_png(400, 60_000), "?view=overlay")
    yield (
        "tensor of 10.9 MP, as JSON",
        sent(attacks.tensor(3300, 3300).replace(b"Host: x", b"Host: x\r\nConnection: close")),
    )
    yield "JSON of 8 MB of []", sent(attacks.post("/v2/models/color/infer", b"[" + b"[]," * 2_700_000 + b"[]]", close))


def serving_bytes(server: Served) -> int:
    """Memory of the service and its decoders; that of the workers is the network's."""
    return server.resident_bytes(server.pid, *server.decoders())


def measure_attack(server: Served, attack: Attack, seconds: float) -> dict[str, Any]:
    """What healthy clients and the memory see while `CLIENTS` clients attack again and again."""
    port = server.port
    end = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()

    def client() -> None:
        while time.monotonic() < end:
            try:
                outcomes[attack(port)] += 1
            except OSError as error:
                outcomes[type(error).__name__] += 1

    before = serving_bytes(server)
    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    memory = []
    with multiprocessing.get_context("spawn").Pool(1) as healthy:
        healthy.apply(time.sleep, (0,))  # started before it counts
        end = time.monotonic() + seconds
        probe = healthy.apply_async(load.probe, (port, stripes()[0], seconds, PAUSE_S))
        for thread in clients:
            thread.start()
        while not probe.ready():
            memory.append(serving_bytes(server))
            probe.wait(0.02)
        seen = probe.get()
        for thread in clients:
            thread.join()
    time.sleep(1)
    after = serving_bytes(server)
    statuses = Counter(str(status) for status, _ in seen)
    return {
        "healthy_ms": load.percentiles([took for status, took in seen if status == 200]),
        "healthy statuses": dict(statuses),
        "attackers saw": dict(outcomes),
        "memory_mb": {name: round(size / 2**20) for name, size in
                      (("before", before), ("highest", max(memory)), ("after", after))},
    }  # fmt: skip


def measure_attacks(model: Path, seconds: float, folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Every attack, one after another, on one service."""
    results: dict[str, Any] = {"clients": CLIENTS, "seconds each": seconds, "max_memory_mb": MAX_MEMORY}
    with Served(model, folder, *options, "--name", "color", "--max-memory", MAX_MEMORY) as server:
        start = serving_bytes(server)
        for name, attack in all_attacks():
            results[name] = measure_attack(server, attack, seconds)
            print(name, results[name], flush=True)
        measured = {name: value for name, value in results.items() if isinstance(value, dict)}
        slowest = {name: value["healthy_ms"].get("p99", float("inf")) for name, value in measured.items()}
        highest = {name: value["memory_mb"]["highest"] - round(start / 2**20) for name, value in measured.items()}
        results["worst p99 of healthy clients, ms"] = max(slowest.values())
        results["highest memory above the start, mb"] = max(highest.values())
        problems = [f"{name}: p99 of healthy clients {p99} ms" for name, p99 in slowest.items() if p99 > HEALTHY_MS]
        problems += [f"{name}: {size} MB" for name, size in highest.items() if size > 1.25 * MAX_MEMORY]
        problems += ["a traceback in the log"] * server.log.count("Traceback")
        results |= {"lost or wrong": len(problems), "problems": problems}
    return results

# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, each checking every response. Light, so that it leaves the cores to the service."""

import asyncio
import contextlib
import http.client
import time
from dataclasses import dataclass, field

import numpy as np

from support.served import WAIT_S, decoded


@dataclass
class Sample:
    """An image file and what a direct call returns for it."""

    data: bytes  # of the image file
    png: bytes  # the labels as the service would encode them
    labels: np.ndarray


@dataclass
class Report:
    """What the clients saw; latencies in seconds."""

    answered: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    identical: int = 0
    rounding: int = 0  # labels that differ in at most one pixel of a thousand: sums in another order
    wrong: list = field(default_factory=list)
    seconds: float = 0.0

    def summary(self):
        """Plain data, latencies in milliseconds."""
        return {
            "requests": len(self.answered) + len(self.refused) + len(self.wrong),
            "answered": len(self.answered),
            "identical to a direct call": self.identical,
            "within rounding of a direct call": self.rounding,
            "refused with 503": len(self.refused),
            "lost or wrong": len(self.wrong),
            "answered per second": round(len(self.answered) / self.seconds, 1),
            "answered_ms": percentiles(self.answered),
            "refused_ms": percentiles(self.refused),
        }


def percentiles(seconds):
    """p50, p95, p99 and max in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.array(seconds) * 1e3, [50, 95, 99, 100])
    return {name: round(float(value), 1) for name, value in zip(("p50", "p95", "p99", "max"), values, strict=True)}


def probe(port, data, seconds, pause_s=0.05):
    """(status, seconds) of one request after another, from a process that does nothing else."""
    seen, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)) as connection:
            connection.connect()
            began = time.monotonic()
            connection.request("POST", "/v1/segment", body=data)
            response = connection.getresponse()
            response.read()
            seen.append((response.status, time.monotonic() - began))
        time.sleep(pause_s)
    return seen


async def run(port, samples, *, clients, seconds=None, each=None, max_pause_s=2.0):
    """Send the samples from `clients` connections, for some seconds or `each` client so many.

    After a 503 a client waits for the time in Retry-After, but at most `max_pause_s`.
    """
    report = Report()
    started = time.monotonic()
    until = started + seconds if seconds else float("inf")
    tasks = [
        asyncio.create_task(_client(port, samples, number, until, each, max_pause_s, report))
        for number in range(clients)
    ]
    await asyncio.gather(*tasks)
    report.seconds = time.monotonic() - started
    return report


async def _client(port, samples, number, until, each, max_pause_s, report):
    reader = writer = None
    sent = 0
    while time.monotonic() < until and (each is None or sent < each):
        sample = samples[(number * 7 + sent) % len(samples)]
        sent += 1
        began = time.monotonic()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            began = time.monotonic()
            status, headers, body = await asyncio.wait_for(_request(reader, writer, sample.data), WAIT_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
            report.wrong.append(f"lost: {error!r}")
            writer = None
            continue
        took = time.monotonic() - began
        if status == 503 and "retry-after" in headers:
            report.refused.append(took)
            # Spread over half a second more, as clients that do not act in step would.
            spread_s = min(0.5, max_pause_s) * (number % 50) / 50
            await asyncio.sleep(min(int(headers["retry-after"]), max_pause_s) + spread_s)
        elif status == 200:
            _judge(sample, body, took, report)
        else:
            report.wrong.append(f"{status}: {body[:200]!r}")
        if headers.get("connection") == "close":
            writer.close()
            writer = None
    if writer is not None:
        writer.close()


async def _request(reader, writer, data):
    writer.write(b"POST /v1/segment HTTP/1.1\r\nHost: load\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, body


def _judge(sample, body, took, report):
    if body == sample.png:
        report.identical += 1
    else:
        labels = decoded(body)
        if labels.shape != sample.labels.shape or (labels != sample.labels).mean() > 1e-3:
            report.wrong.append("another label map")
            return
        report.rounding += 1
    report.answered.append(took)

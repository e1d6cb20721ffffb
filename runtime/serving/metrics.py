# SPDX-License-Identifier: Apache-2.0
"""Metrics of a service, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one service, in a registry of their own so that several services fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "internimage_requests", "Requests with a response.", ("route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "internimage_request_seconds",
            "Seconds from the request's headers to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.refused = Counter(
            "internimage_refused",
            "Requests that ended with an error response, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.images = Counter("internimage_pictures", "Segmented images.", registry=self.registry)
        self.stage_seconds = Histogram(
            "internimage_stage_seconds",
            "Seconds of one image in each stage: read, decode, queue, run, encode.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "internimage_batch_size",
            "Images in one run of the network.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.queue = Gauge("internimage_queue_pictures", "Images that wait for the network.", registry=self.registry)
        self.memory = Gauge(
            "internimage_request_memory_bytes",
            "Bytes of request bodies and decoded images in memory.",
            registry=self.registry,
        )
        self.workers = Gauge("internimage_workers", "Workers with a loaded model.", registry=self.registry)
        self.worker_restarts = Counter(
            "internimage_worker_restarts", "Workers that were replaced.", registry=self.registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

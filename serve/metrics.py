"""Numbers of a service for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from forcingkv.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Metrics:
    """Of one service, in a registry of its own: several in a process do not mix."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(engine))
        count = partial(Counter, registry=self._registry)
        spread = partial(Histogram, registry=self._registry, buckets=SECONDS)
        self.sessions = count("forcingkv_sessions", "Live sessions that began.", ["bundle"])
        self.ended = count("forcingkv_sessions_ended", "Live sessions that ended.", ["reason"])
        self.jobs = count("forcingkv_jobs", "Jobs that ended.", ["status"])
        self.frames = count("forcingkv_frames", "Frames that were made.", ["bundle"])
        self.refusals = count("forcingkv_refusals", "Messages and requests refused.", ["code"])
        self.bytes_sent = count("forcingkv_sent_bytes", "Bytes of frames for clients.")
        self.chunk = spread("forcingkv_chunk_seconds", "Making a chunk.", ["bundle"])
        self.first = spread("forcingkv_first_chunk_seconds", "From start to the first chunk.")
        self.waited = spread("forcingkv_wait_seconds", "Waiting for a place.")

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Now(Collector):
    """What is true at the moment it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        places, bundles = self._engine.places, self._engine.bundles
        yield GaugeMetricFamily("forcingkv_sessions_open", "Places that are taken.", places.held)
        yield GaugeMetricFamily("forcingkv_sessions_most", "Places that there are.", places.most)
        yield GaugeMetricFamily("forcingkv_queue", "Who waits for a place.", places.waiting)
        yield GaugeMetricFamily("forcingkv_draining", "1 while the service ends.", self._engine.draining)
        memory = GaugeMetricFamily("forcingkv_memory_bytes", "Memory by part.", labels=("part",))
        memory.add_metric(("process",), psutil.Process().memory_info().rss)
        memory.add_metric(("weights",), sum(bundle.weight_bytes for bundle in bundles.values()))
        memory.add_metric(("sessions",), places.used)
        memory.add_metric(("room",), places.memory - places.used)
        yield memory

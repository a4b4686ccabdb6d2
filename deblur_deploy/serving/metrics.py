"""What a service counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One service's numbers; a registry of their own lets several services live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("deblur_requests", "Answers of /restore.", ["status"], registry=self._registry)
        self.under_way = Gauge("deblur_under_way", "Requests admitted and not yet answered.", registry=self._registry)
        self.seconds = Histogram(
            "deblur_request_seconds",
            "From a request to its restored image.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.engine_seconds = Histogram(
            "deblur_engine_seconds", "In the engine alone.", buckets=_SECONDS, registry=self._registry
        )
        self.pixels = Counter("deblur_pixels", "Pixels restored.", registry=self._registry)

    def text(self) -> bytes:
        """All of it, as ``/metrics`` answers."""
        return generate_latest(self._registry)

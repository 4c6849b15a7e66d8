"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, histograms and gauges."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        prefix = "ensemble_rm_"
        self.requests = Counter(
            f"{prefix}requests",
            "Responses, by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self.latency = Histogram(
            f"{prefix}request_seconds",
            "Time from a request's headers to its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.failed = Counter(
            f"{prefix}failed_samples",
            "Samples that could not be scored.",
            ["error"],
            registry=registry,
        )
        self.missing = Counter(
            f"{prefix}missing_member_scores",
            "Scores missing from a member, of samples that have a reward.",
            ["member"],
            registry=registry,
        )
        self.truncated = Counter(
            f"{prefix}truncated_samples", "Samples that a member truncated.", registry=registry
        )
        self.batch_rows = Histogram(
            f"{prefix}batch_samples", "Samples per batch.", buckets=_ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            f"{prefix}batch_seconds", "Time to score a batch.", buckets=_SECONDS, registry=registry
        )
        self.version = Gauge(
            f"{prefix}version_info",
            "1 for the version that is served.",
            ["version"],
            registry=registry,
        )

    def follow(
        self, name: str, text: str, read: Callable[[], float], *, counter: bool = False
    ) -> None:
        """Add a metric whose value is read at each scrape.

        Parameters
        ----------
        name, text : str
            Its name, without the prefix, and its help text.
        read : callable
        counter : bool
            Whether it never falls; its name then ends in ``_total``.
        """
        self.registry.register(_Followed(f"ensemble_rm_{name}", text, read, counter=counter))

    def serve(self, version: str) -> None:
        """Set the version that is served."""
        # Only one version at a time has the value 1.
        self.version.clear()
        self.version.labels(version).set(1)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Followed(Collector):
    """A metric whose value is read at each scrape."""

    def __init__(self, name: str, text: str, read: Callable[[], float], *, counter: bool) -> None:
        self._name, self._text, self._read, self._counter = name, text, read, counter

    def collect(self) -> Iterable[Metric]:
        """Return the current value."""
        family = CounterMetricFamily if self._counter else GaugeMetricFamily
        return [family(self._name, self._text, value=self._read())]

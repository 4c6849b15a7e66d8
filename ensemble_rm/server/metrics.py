"""What Prometheus reads of a server, in a registry of its own.

Knows counts and seconds; knows nothing of HTTP or of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        prefix = "ensemble_rm_"
        self.requests = Counter(
            f"{prefix}requests",
            "Answers, by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self.latency = Histogram(
            f"{prefix}request_seconds",
            "From a request's headers to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.failed = Counter(
            f"{prefix}failed_samples", "Samples without a reward.", ["error"], registry=registry
        )
        self.missing = Counter(
            f"{prefix}missing_member_scores",
            "Of rewarded samples, scores that a member did not give.",
            ["member"],
            registry=registry,
        )
        self.truncated = Counter(
            f"{prefix}truncated_samples", "Samples that a member read in part.", registry=registry
        )
        self.batch_rows = Histogram(
            f"{prefix}batch_samples", "Samples of a batch.", buckets=_ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            f"{prefix}batch_seconds", "Of scoring a batch.", buckets=_SECONDS, registry=registry
        )
        self.version = Gauge(
            f"{prefix}version_info",
            "1 for the version that serves.",
            ["version"],
            registry=registry,
        )

    def follow(
        self, name: str, what: str, read: Callable[[], float], *, grows: bool = False
    ) -> None:
        """Read a figure wherever it is kept, when Prometheus asks.

        Parameters
        ----------
        name, what : str
            Its name, without the prefix, and what it says.
        read : callable
        grows : bool
            Whether it only grows: a counter, whose name ends in ``_total``.
        """
        self.registry.register(_Followed(f"ensemble_rm_{name}", what, read, grows=grows))

    def batch(self, rows: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(seconds)

    def serve(self, version: str) -> None:
        """Say which version serves."""
        self.version.clear()
        self.version.labels(version).set(1)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Followed(Collector):
    """One figure, read when it is asked for."""

    def __init__(self, name: str, what: str, read: Callable[[], float], *, grows: bool) -> None:
        self._name, self._what, self._read, self._grows = name, what, read, grows

    def collect(self) -> Iterable[Metric]:
        """Return the figure as it is now."""
        family = CounterMetricFamily if self._grows else GaugeMetricFamily
        return [family(self._name, self._what, value=self._read())]

"""Metrics in the formats of Prometheus and OpenMetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from netota_coap.monitoring import METRICS, Metrics, Status

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


@attrs.frozen
class MetricsCollector(Collector):
    """All metrics of a service, for `prometheus_client`."""

    metrics: Metrics
    status: Callable[[], Status]

    def collect(self) -> Iterable[Family]:
        """Return each metric with its samples."""
        families = {
            metric.name: _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for metric in METRICS
        }
        for metric, labels, value in self.metrics.samples(self.status()):
            families[metric.name].add_metric(labels, value)
        return families.values()

    def encode(self, accept: str) -> tuple[str, bytes]:
        """Return content type and payload, in the format that an Accept header prefers."""
        encoder, content_type = choose_encoder(accept)
        return content_type, encoder(self)

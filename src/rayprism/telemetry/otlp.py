"""Points as the OTLP request that Ray's metrics agent takes.

Source: `ReporterAgent._export_number_data` of Ray 2.60. It reads a metric's name, description and
`is_monotonic`, of each point `as_double` and attributes that are strings, and adds what it gets of
sums to what it has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_DELTA,
    Metric,
    NumberDataPoint,
)

from rayprism.telemetry.catalogue import find_metric
from rayprism.telemetry.recorder import Point

__all__ = ["RequestBuilder"]

_SCOPE = "rayprism"


class RequestBuilder:
    """Makes requests, and keeps the labels that it has seen: most of the time goes into those."""

    def __init__(self) -> None:
        self._seen: dict[tuple[tuple[str, str], ...], NumberDataPoint] = {}

    def build(self, points: Iterable[Point]) -> ExportMetricsServiceRequest:
        """One request with all of them.

        Counters are monotonic sums. The parts of histograms are sums that are not: the agent
        would write `_total` after the name of one that is, and would write those of an OTLP
        histogram observation by observation, with the middle of the bucket for its value.
        """
        request = ExportMetricsServiceRequest()
        scope = request.resource_metrics.add().scope_metrics.add()
        scope.scope.name = _SCOPE
        now_ns = time.time_ns()
        metrics: dict[str, Metric] = {}
        for point in points:
            metric = metrics.get(point.name)
            if metric is None:
                metric = metrics[point.name] = scope.metrics.add()
                _describe(metric, point)
            data = metric.gauge if point.kind == "gauge" else metric.sum
            known = self._labelled(point)
            known.as_double = point.value
            known.time_unix_nano = now_ns
            data.data_points.append(known)  # a copy
        return request

    def _labelled(self, point: Point) -> NumberDataPoint:
        known = self._seen.get(point.labels)
        if known is None:
            known = self._seen[point.labels] = NumberDataPoint(
                attributes=[
                    KeyValue(key=label, value=AnyValue(string_value=value))
                    for label, value in point.labels
                ]
            )
        return known


def _describe(metric: Metric, point: Point) -> None:
    in_parts = point.kind == "histogram"
    metric.name = point.name
    # Of a part of a histogram: what stands before `_bucket`, `_count`, `_sum`.
    metric.description = find_metric(
        point.name.rpartition("_")[0] if in_parts else point.name
    ).meaning
    if point.kind != "gauge":
        metric.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_DELTA
        metric.sum.is_monotonic = not in_parts

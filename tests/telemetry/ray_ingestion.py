"""Run as a program: what Ray's own agent makes of requests of ours, as Prometheus would see it.

It sets global providers and Ray's authentication, so it is a process of its own. Standard input:
requests in base64, one a line. Standard output: JSON, what the agent would be scraped for.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from prometheus_client import REGISTRY
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
from ray.dashboard.modules.reporter.reporter_agent import ReporterAgent

NOISE = ("otel_scope_name", "otel_scope_version", "otel_scope_schema_url")


def main() -> None:
    # Its constructor wants a node. These two are all that it takes requests with.
    agent: Any = ReporterAgent.__new__(ReporterAgent)
    agent._open_telemetry_metric_recorder = OpenTelemetryMetricRecorder(20.0)
    agent._export_failure_warned = set()
    for line in sys.stdin:
        request = ExportMetricsServiceRequest.FromString(base64.b64decode(line))
        agent._ingest_exported_metrics(request)
    samples = [
        (sample.name, {k: v for k, v in sample.labels.items() if k not in NOISE}, sample.value)
        for family in REGISTRY.collect()
        if family.name.startswith("ray_")
        for sample in family.samples
    ]
    print(json.dumps({"samples": samples, "failed": sorted(agent._export_failure_warned)}))


if __name__ == "__main__":
    main()

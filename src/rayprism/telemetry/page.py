"""Writes docs/metrics.md from the catalogue, or says whether that is current.

    python -m rayprism.telemetry.page            writes it
    python -m rayprism.telemetry.page --check    exits with 1 where it is stale

Run it in the root of the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rayprism.telemetry.catalogue import CATALOGUE, LABELS, REASONS, Metric

__all__ = ["PAGE_FILE", "main", "render_page"]

PAGE_FILE = Path("docs") / "metrics.md"

_SERIES = 2000
"""Source: `_DEFAULT_CARDINALITY_LIMIT` of the OpenTelemetry SDK that Ray's agent runs."""

_GROUPS = (
    ("Requests", "rayprism_requests_total"),
    ("Batches and queue", "rayprism_batch_rows"),
    ("Versions side by side", "rayprism_traffic_weight_ratio"),
    ("Replicas", "rayprism_replica_info"),
    ("GPUs", "rayprism_gpu_memory_used_bytes"),
    ("Batch jobs", "rayprism_job_rows_total"),
)
"""Headings, and the first metric below each, in the catalogue's order."""

_UNITS = {
    "seconds": "seconds",
    "bytes": "bytes",
    "rows": "rows",
    "ratio": "0 to 1",
    "info": "always 1",
}

_TOP = """\
<!-- Made by `python -m rayprism.telemetry.page` from src/rayprism/telemetry/catalogue.py. -->

# Metrics

Every replica, and the driver of every batch job on a cluster, counts in its own memory, and sends
what was added every five seconds over OTLP to the Ray agent of its node. The agent adds up all
processes of the node, and Prometheus scrapes the agent. What is `rayprism_x` in the code is
`ray_rayprism_x` there.

- **Counters and histograms** of a node are one series for all of its replicas, exact, and outlive
  them. Several nodes have a series each (`instance`), so aggregate:
  `sum by (cluster, model, version) (rate(...))`.
- **Gauges** are one series for each replica, and end 20 seconds after it.
- A series that a replica knows of when it starts begins at 0. One whose labels come only with the
  event (`reason`, `outcome`) begins with its first count, which `increase()` does not see.
- **When the agent is away**, what was counted is kept, and sent when it is back. One that is
  started again counts from 0, as `rate()` expects. Points that it took without an answer within 30
  seconds are not sent again: they might count twice.
- **Without an agent** nothing is sent, and the log says so once.

No label holds what a client sent: all values come from Serve files, manifests, job files and fixed
lists. Prometheus adds `instance` and `job`, the scrape configuration adds `cluster`, and the agent
adds `otel_scope_*`, which say nothing.
"""

_WHY = f"""\
## Why not ray.util.metrics

It labels every series with the id of the worker process, so each replica that ever ran adds series
that never end. And the agent replays its histograms observation by observation, each with the
middle of its bucket for a value: slow where there are many, and the sums (so the means) are not
true. What is sent here is counted already: a counter as a monotonic sum; the `_bucket`, `_count`
and `_sum` of a histogram each as a sum of its own. Prometheus shows these three with type `gauge`;
`rate()` and `histogram_quantile()` work on them as on any histogram.

## How many series fit

The agent's OpenTelemetry SDK keeps {_SERIES:,} series of each name for as long as the agent lives,
and counts all others in one series with the label `otel_metric_overflow="true"`. What it has once
seen stays until the agent ends, with the node's Ray. What fills first:

| | series each | fits on one node, in the agent's life |
|---|---|---|
{{limits}}

The alert `RayprismMetricsOverflow` tells when one is full: start Ray again on that node, or spread
versions over more nodes. How near it is:

```promql
topk(5, count by (cluster, instance, __name__) ({{{{__name__=~"ray_rayprism_.+"}}}}))
```
"""

_QUERIES = (
    (
        "Requests a second, by version",
        'sum by (cluster, model, version) (rate(ray_rayprism_requests_total{source="client"}[1m]))',
    ),
    (
        "99th percentile of a version's request time",
        "histogram_quantile(0.99,\n"
        "  sum by (cluster, model, version, le) (rate(ray_rayprism_request_seconds_bucket[2m])))",
    ),
    (
        "The slowest stage of each version, by mean time",
        "topk by (cluster, model, version) (1, rayprism:stage_seconds:mean)",
    ),
    (
        "Share of requests that failed through our fault",
        'sum by (cluster, model) (rate(ray_rayprism_requests_total{source="client",\n'
        '  outcome="server_error"}[5m]))\n'
        "/ sum by (cluster, model) (rate(ray_rayprism_requests_total"
        '{source="client"}[5m]))',
    ),
    (
        "Why requests failed, in the last hour",
        "sum by (cluster, model, version, reason) (\n"
        '  increase(ray_rayprism_requests_total{source="client", outcome!="ok"}[1h])) > 0',
    ),
    (
        "Rows in a batch, on average",
        "sum by (cluster, model, version) (rate(ray_rayprism_batch_rows_sum[5m]))\n"
        "/ sum by (cluster, model, version) (rate(ray_rayprism_batch_rows_count[5m]))",
    ),
    (
        "Share of the work that is padding",
        "sum by (cluster, model, version) (rate(ray_rayprism_batch_padding_total[5m]))\n"
        "/ sum by (cluster, model, version) (rate(ray_rayprism_batch_cost_total[5m]))",
    ),
    (
        "Rows a second of a batch job",
        "sum by (cluster, batch_job) (rate(ray_rayprism_job_rows_total[1m]))",
    ),
)

_RAY = (
    (
        "ray_serve_application_status",
        "`application`",
        "6 where it runs; 5 deploying, 2 unhealthy, 1 failed",
    ),
    ("ray_serve_deployment_status", "`application`, `deployment`", "6 where it is healthy"),
    (
        "ray_serve_deployment_replica_healthy",
        "`application`, `deployment`, `replica`",
        "1, or 0",
    ),
    (
        "ray_serve_autoscaling_target_replicas",
        "`application`, `deployment`",
        "how many replicas Serve wants",
    ),
    (
        "ray_serve_replica_processing_queries",
        "`application`, `deployment`, `replica`",
        "requests within it now",
    ),
    ("ray_cluster_active_nodes", "`node_type`", "nodes"),
    ("ray_node_cpu_utilization, ray_node_cpu_count", "", "percent; cores"),
    ("ray_node_mem_used, ray_node_mem_total", "", "bytes"),
    ("ray_node_disk_usage, ray_node_disk_free", "", "bytes"),
    ("ray_node_network_receive_speed, ray_node_network_send_speed", "", "bytes a second"),
    (
        "ray_node_gpus_utilization, ray_node_gram_used, ray_node_gram_available",
        "`GpuIndex`, `GpuDeviceName`",
        "percent; MB. Only on nodes with GPUs",
    ),
    ("ray_object_store_memory", "`Location`", "bytes"),
    (
        "ray_component_rss_bytes, ray_component_cpu_percentage",
        "`Component`, `pid`",
        "bytes; percent",
    ),
    ("ray_actors", "`State`", "actors"),
)
_HAPROXY = (
    ("haproxy_frontend_http_requests_total", "`proxy`", "requests that came in"),
    ("haproxy_backend_http_responses_total", "`proxy`, `code`", 'answers, `code="5xx"` and so on'),
    ("haproxy_backend_current_sessions", "`proxy`", "requests on their way now"),
    ("haproxy_backend_current_queue", "`proxy`", "requests that wait for a replica"),
    ("haproxy_backend_active_servers", "`proxy`", "replicas that it sends to"),
    ("haproxy_backend_connection_errors_total", "`proxy`", "replicas that could not be reached"),
    ("haproxy_backend_response_errors_total", "`proxy`", "answers that broke off"),
    ("haproxy_backend_retry_warnings_total", "`proxy`", "requests that were sent again"),
    ("haproxy_backend_total_time_average_seconds", "`proxy`", "mean of the last 1,024 requests"),
)


def render_page() -> str:
    """The page, in Markdown."""
    parts = [_TOP]
    for heading, metrics in _grouped():
        head = ("name", "type", "labels", "unit", "meaning")
        parts.append(f"## {heading}\n\n{_table(head, map(_row, metrics))}{_buckets(metrics)}")
    parts += [
        f"## Labels\n\n{_table(('label', 'meaning'), _label_rows())}\n"
        f"Values of `reason` of requests: {', '.join(f'`{reason}`' for reason in REASONS)}.\n",
        _WHY.format(limits="\n".join(_limits())),
        "## Questions, as PromQL\n\nNames with colons are of dashboards/prometheus/rules.yml.\n\n"
        + "\n".join(f"{title}:\n\n```promql\n{query}\n```\n" for title, query in _QUERIES),
        "## Of Ray and HAProxy\n\nOurs say what models do; what they run on is told by Ray and by "
        "Serve's HAProxy. The dashboards use:\n\n"
        + _table(("name", "labels", "what"), map(_foreign_row, _RAY))
        + "\n"
        + _table(("name", "labels", "what"), map(_foreign_row, _HAPROXY))
        + "\nHAProxy's backends are named `http-<application>` and `grpc-<application>`.\n",
    ]
    return "\n".join(parts)


def _grouped() -> list[tuple[str, list[Metric]]]:
    starts = {first: heading for heading, first in _GROUPS}
    groups: list[tuple[str, list[Metric]]] = []
    for metric in CATALOGUE:
        if metric.name in starts:
            groups.append((starts[metric.name], []))
        groups[-1][1].append(metric)
    return groups


def _row(metric: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"`{metric.exported}`", metric.kind, labels, _unit(metric), metric.meaning


def _unit(metric: Metric) -> str:
    name = metric.name.removesuffix("_total")
    return next((unit for end, unit in _UNITS.items() if name.endswith(f"_{end}")), "")


def _buckets(metrics: Iterable[Metric]) -> str:
    """A sentence for each set of bounds."""
    shared: dict[tuple[float, ...], list[str]] = {}
    for metric in metrics:
        if metric.buckets:
            shared.setdefault(metric.buckets, []).append(f"`{metric.exported}`")
    return "".join(
        f"\nBuckets of {names[0] if len(names) == 1 else f'these {len(names)} histograms'}, up to: "
        f"{', '.join(f'{bound:g}' for bound in bounds)}, `+Inf`.\n"
        for bounds, names in shared.items()
    )


def _label_rows() -> list[tuple[str, str]]:
    return [
        *((f"`{label}`", meaning) for label, meaning in LABELS.items()),
        ("`le`", "Of `_bucket`: the upper bound; each bucket holds those below it as well."),
    ]


def _limits() -> list[str]:
    widest = max(
        (metric for metric in CATALOGUE if metric.kind == "histogram"),
        key=lambda metric: len(metric.buckets),
    )
    series = len(widest.buckets) + 1
    return [
        f"| `_bucket` of a histogram of seconds | {series} for each version "
        f"| {_SERIES // series} versions of models |",
        f"| a gauge | 1 for each replica | {_SERIES:,} starts of replicas |",
    ]


def _foreign_row(row: tuple[str, str, str]) -> tuple[str, str, str]:
    names, labels, what = row
    return ", ".join(f"`{name}`" for name in names.split(", ")), labels, what


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; see the module.

    Returns:
        The exit status: 0 where the page was written, or is current.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) not in ([], ["--check"]):
        print("usage: python -m rayprism.telemetry.page [--check]", file=sys.stderr)
        return 2
    page = render_page()
    if not arguments:
        PAGE_FILE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE_FILE}")
        return 0
    if PAGE_FILE.exists() and PAGE_FILE.read_text(encoding="utf-8") == page:
        print(f"{PAGE_FILE} is current")
        return 0
    print(f"{PAGE_FILE} is stale: run python -m rayprism.telemetry.page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())

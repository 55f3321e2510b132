"""One model and its versions side by side."""

from __future__ import annotations

from rayprism.telemetry.dashboards.expressions import events, ours, ratio, select, sum_by
from rayprism.telemetry.dashboards.model_parts import (
    batch_panels,
    memory_panels,
    queue_panels,
    replica_panels,
    shadow_panels,
)
from rayprism.telemetry.dashboards.panels import (
    ALERTS_LINK,
    TARGET,
    Dashboard,
    Panel,
    Query,
    Row,
    Variable,
    cluster_variable,
    docs_link,
    page_link,
    stat,
)
from rayprism.telemetry.dashboards.scopes import MODEL, OUTCOME_COLORS, STAGE_COLORS, VERSIONS

__all__ = ["model_dashboard"]

_TO_FLEET = page_link("fleet", "All models")
_TO_CLUSTER = page_link("cluster", "The cluster")
_REQUEST_LINKS = (docs_link("requests"), _TO_FLEET)
_STAGE_LINKS = (docs_link("requests"), _TO_CLUSTER)

_STABLE = f"on (cluster, model, version) {select('rayprism:stable:info', MODEL)}"
_P99_TARGET = Query(f"min({ours('rayprism_target_p99_seconds', MODEL)})", "p99 target", TARGET)
_ERRORS_TARGET = Query(
    f"1 - max({ours('rayprism_target_availability_ratio', MODEL)})",
    "allowed by the target",
    TARGET,
)
_WINDOWS = ("5m", "30m", "1h", "6h")


def model_dashboard() -> Dashboard:
    """The dashboard of one model."""
    return Dashboard(
        name="model",
        title="rayprism: model",
        description="One model, version by version: how it answers, where the time goes, and "
        "whether a candidate does as well as the stable version. Of several clusters, rates are "
        "added up and the worst percentile is shown.",
        variables=(
            cluster_variable("ray_rayprism_replica_info"),
            Variable(
                "model",
                "Model",
                'label_values(ray_rayprism_replica_info{cluster=~"$cluster"}, model)',
                many=False,
            ),
            Variable(
                "version",
                "Version",
                'label_values(ray_rayprism_replica_info{cluster=~"$cluster",model="$model"}, '
                "version)",
            ),
        ),
        rows=(
            Row("Now", _stats()),
            Row("Traffic and errors", _traffic()),
            Row("Latency: stable version and candidates", _latency()),
            Row("Where the time goes: version $version", _stages(), repeat="version"),
            Row("Batches", batch_panels()),
            Row("Queue", queue_panels()),
            Row("Memory and GPUs", memory_panels()),
            Row("Versions side by side", shadow_panels()),
            Row("Replicas", replica_panels()),
        ),
    )


def _stats() -> tuple[Panel, ...]:
    requests = select("rayprism:requests:rate1m", MODEL)
    failed = select("rayprism:requests:rate1m", MODEL, 'outcome="server_error"')
    p99 = select("rayprism:request_seconds:p99", MODEL)
    return (
        Panel(
            title="Stable version",
            description="The version behind the model's own address. Two names at once: a "
            "promotion is under way, or clusters differ.",
            unit="none",
            queries=(
                Query(f"max by (version) ({select('rayprism:stable:info', MODEL)})", "{{version}}"),
            ),
            links=(docs_link("replicas"), _TO_FLEET),
            kind="stat",
            width=4,
            height=4,
            names_series=True,
        ),
        stat(
            "Requests",
            "Requests of clients by second, over all versions.",
            "reqps",
            f"sum({requests}) or vector(0)",
            _REQUEST_LINKS,
        ),
        stat(
            "Error ratio",
            "Share of clients' requests that failed on the server's side in the last minute, over "
            "all versions.",
            "percentunit",
            f"(sum({failed}) or vector(0)) / (sum({requests}) > 0) or vector(0)",
            _REQUEST_LINKS,
            ((0.001, "yellow"), (0.01, "red")),
        ),
        stat(
            "Stable p99",
            "The 99th percentile of the stable version.",
            "s",
            f"max({p99} and {_STABLE})",
            _REQUEST_LINKS,
        ),
        stat(
            "p99 / target",
            "The stable version's p99 as a share of `telemetry.p99_target_s`: above 100 % it is "
            "slower than promised.",
            "percentunit",
            f"max({p99} and {_STABLE}) / min({ours('rayprism_target_p99_seconds', MODEL)})",
            _REQUEST_LINKS,
            ((0.8, "yellow"), (1.0, "red")),
            no_value="No target",
        ),
        stat(
            "Replicas ready",
            "Replicas of all versions that have loaded and answer.",
            "none",
            f"sum({ours('rayprism_replica_info', MODEL)}) or vector(0)",
            (docs_link("replicas"), _TO_CLUSTER),
            ((0.0, "red"), (1.0, "green")),
        ),
    )


def _traffic() -> tuple[Panel, ...]:
    requests = select("rayprism:requests:rate1m", VERSIONS)
    failed = select("rayprism:requests:rate1m", VERSIONS, 'outcome="server_error"')
    by_protocol = ours("rayprism_requests_total", VERSIONS, 'source="client"')
    wrong = ours("rayprism_requests_total", VERSIONS, 'source="client"', 'outcome!="ok"')
    return (
        Panel(
            title="Requests by version",
            description="Requests of clients by second, by the version that answered.",
            unit="reqps",
            queries=(Query(sum_by("version", requests), "{{version}}"),),
            links=_REQUEST_LINKS,
            stacked=True,
        ),
        Panel(
            title="Requests by protocol",
            description="Requests of clients by second, over HTTP and gRPC. One that falls to 0 "
            "alone points at a proxy or at one client.",
            unit="reqps",
            queries=(
                Query(sum_by("protocol", f"rate({by_protocol}[$__rate_interval])"), "{{protocol}}"),
            ),
            links=(docs_link("requests"), _TO_CLUSTER),
            stacked=True,
        ),
        Panel(
            title="Requests by outcome",
            description="How requests ended. `client_error` is the callers' doing; `cancelled` "
            "means that they did not wait, which is often the first sign of slowness.",
            unit="reqps",
            queries=(Query(sum_by("outcome", requests), "{{outcome}}"),),
            links=_REQUEST_LINKS,
            stacked=True,
            colors=OUTCOME_COLORS,
        ),
        Panel(
            title="Error ratio by version",
            description="Share of requests that failed on the server's side. A candidate above "
            "the stable version should not get more traffic.",
            unit="percentunit",
            queries=(
                Query(ratio(sum_by("version", failed), sum_by("version", requests)), "{{version}}"),
                _ERRORS_TARGET,
            ),
            links=_REQUEST_LINKS,
        ),
        Panel(
            title="Error ratio against the availability target",
            description="Over short and long windows. All of them above the dashed line: the "
            "error budget is being spent now, and fast; only the long ones: it is over already.",
            unit="percentunit",
            queries=(
                *(
                    Query(
                        f"max({select(f'rayprism:error_ratio:rate{window}', MODEL)})",
                        window,
                    )
                    for window in _WINDOWS
                ),
                _ERRORS_TARGET,
            ),
            links=(ALERTS_LINK, _TO_FLEET),
        ),
        Panel(
            title="What went wrong, by reason",
            description="Requests that did not succeed, in the time of each bar. "
            "The request log has each of them under its request id.",
            unit="short",
            queries=(Query(events("version, reason", wrong), "{{version}} {{reason}}"),),
            links=_REQUEST_LINKS,
            bars=True,
            no_value="Nothing went wrong",
        ),
    )


def _latency() -> tuple[Panel, ...]:
    buckets = ours("rayprism_request_seconds", VERSIONS, part="bucket")
    return (
        _percentiles(
            "Stable version",
            "Percentiles of the stable version, from the client's whole request to its answer. "
            "p99 far above p50 while the queue is short: look at the stages.",
            MODEL,
            f"and {_STABLE}",
        ),
        _percentiles(
            "Other versions",
            "The same of candidates, and of versions that have only their own address. Compare "
            "with the stable version under traffic that is alike.",
            VERSIONS,
            f"unless {_STABLE}",
            no_value="No other version gets requests",
        ),
        Panel(
            title="p99 by version",
            description="All versions in one chart, with the target that the Serve file sets.",
            unit="s",
            queries=(
                Query(
                    f"max by (version) ({select('rayprism:request_seconds:p99', VERSIONS)})",
                    "{{version}}",
                ),
                _P99_TARGET,
            ),
            links=_REQUEST_LINKS,
            height=10,
        ),
        Panel(
            title="Seconds of requests",
            description="How many requests took how long. Two bands mean two kinds of requests, "
            "or two replicas that are not alike; a mean would hide them.",
            unit="reqps",
            queries=(Query(sum_by("le", f"rate({buckets}[$__rate_interval])"), "{{le}}"),),
            links=_REQUEST_LINKS,
            kind="heatmap",
            width=24,
            minimum=None,
        ),
    )


def _percentiles(
    title: str, description: str, scope: tuple[str, ...], which: str, no_value: str = ""
) -> Panel:
    return Panel(
        title=f"{title}: p50, p90, p99",
        description=description,
        unit="s",
        queries=(
            *(
                Query(
                    f"max by (version) ({select(f'rayprism:request_seconds:{q}', scope)} {which})",
                    f"{q} {{{{version}}}}",
                )
                for q in ("p50", "p90", "p99")
            ),
            _P99_TARGET,
        ),
        links=_REQUEST_LINKS,
        height=10,
        no_value=no_value,
    )


def _stages() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Mean time by stage",
            description="What an average request spends in each stage of version $version. `queue` "
            "that grows: too few replicas; `compute`: the model or its batches.",
            unit="s",
            queries=(
                Query(
                    f"max by (stage) ({select('rayprism:stage_seconds:mean', VERSIONS)})",
                    "{{stage}}",
                ),
            ),
            links=_STAGE_LINKS,
            width=12,
            stacked=True,
            colors=STAGE_COLORS,
        ),
        Panel(
            title="p99 by stage",
            description="The slowest of 100 in each stage of version $version. These do not add "
            "up: they are of different requests.",
            unit="s",
            queries=(
                Query(
                    f"max by (stage) ({select('rayprism:stage_seconds:p99', VERSIONS)})",
                    "{{stage}}",
                ),
            ),
            links=_STAGE_LINKS,
            width=12,
            colors=STAGE_COLORS,
        ),
    )

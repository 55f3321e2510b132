"""All models on one page: where to look first."""

from __future__ import annotations

from rayprism.telemetry.dashboards.expressions import events, ours, ratio, select, sum_by
from rayprism.telemetry.dashboards.panels import (
    ALERTS_LINK,
    RED_AT_ONE,
    Column,
    Dashboard,
    Panel,
    Query,
    Row,
    Variable,
    cluster_variable,
    docs_link,
    page_link,
    series_link,
    stat,
)
from rayprism.telemetry.dashboards.scopes import CLUSTER

__all__ = ["fleet_dashboard"]

_SCOPE = (*CLUSTER, 'model=~"$models"')
_OF_VERSION = "model, version"
_OF_ROW = "cluster, model, version"

# An alert on a whole cluster has its label; one on Prometheus itself has none.
_FIRING = 'ALERTS{alertstate="firing",cluster=~"$cluster|"}'

_REQUESTS = select("rayprism:requests:rate1m", _SCOPE)
_FAILED = select("rayprism:requests:rate1m", _SCOPE, 'outcome="server_error"')
_READY = ours("rayprism_replica_info", _SCOPE)
_ERROR_STEPS = ((0.001, "yellow"), (0.01, "red"))

_TO_MODEL = page_link("model", "One model")
_TO_CLUSTER = page_link("cluster", "The cluster")
_REQUEST_LINKS = (_TO_MODEL, docs_link("requests"))
_SIDE_LINKS = (_TO_MODEL, docs_link("versions-side-by-side"))
_REPLICA_LINKS = (_TO_CLUSTER, docs_link("replicas"))


def fleet_dashboard() -> Dashboard:
    """The dashboard of all models."""
    return Dashboard(
        name="fleet",
        title="rayprism: fleet",
        description="All models that the chosen clusters serve: is anything wrong, and with which "
        "model? Of several clusters, rates are added up and the worst percentile is shown.",
        variables=(
            cluster_variable("ray_rayprism_replica_info"),
            Variable(
                "models",
                "Models",
                'label_values(ray_rayprism_replica_info{cluster=~"$cluster"}, model)',
            ),
        ),
        rows=(
            Row("Now", (*_stats(), _models(), _alerts())),
            Row("Traffic and errors", _traffic()),
            Row("Latency", _latency()),
            Row("Versions and replicas", _versions()),
        ),
    )


def _stats() -> tuple[Panel, ...]:
    not_running = select("ray_serve_application_status", CLUSTER)
    return (
        stat(
            "Requests",
            "Requests of clients for inference, by second, of all models. A sudden fall with no "
            "errors means that clients do not reach the fleet.",
            "reqps",
            f"sum({_REQUESTS}) or vector(0)",
            _REQUEST_LINKS,
        ),
        stat(
            "Error ratio",
            "Share of clients' requests that failed on the server's side. Above 1 in 1,000, look "
            "at errors by model and reason.",
            "percentunit",
            f"(sum({_FAILED}) or vector(0)) / (sum({_REQUESTS}) > 0) or vector(0)",
            _REQUEST_LINKS,
            _ERROR_STEPS,
        ),
        stat(
            "Slowest p99",
            "The 99th percentile of the slowest version of any model. What is too slow is for each "
            "model to say: see its own page.",
            "s",
            f"max({select('rayprism:request_seconds:p99', _SCOPE)})",
            _REQUEST_LINKS,
        ),
        stat(
            "Replicas ready",
            "Replicas that have loaded their model and answer. 0: nothing is served.",
            "none",
            f"sum({_READY}) or vector(0)",
            _REPLICA_LINKS,
            ((0.0, "red"), (1.0, "green")),
        ),
        stat(
            "Not running",
            "Serve applications in any state but RUNNING. For minutes during a deployment that is "
            "normal; else the cluster's page says which one, and why.",
            "none",
            f"count(max by (cluster, application) ({not_running}) != 6) or vector(0)",
            _REPLICA_LINKS,
            ((1.0, "orange"),),
        ),
        stat(
            "Firing alerts",
            "Alerts that are firing; the table below has their names.",
            "none",
            f"count({_FIRING}) or vector(0)",
            (ALERTS_LINK,),
            RED_AT_ONE,
        ),
    )


def _alerts() -> Panel:
    # An alert of a whole model has no version, and an empty cell would say that none is firing.
    firing = _FIRING
    for label in ("model", "version"):
        firing = f'label_replace({firing}, "{label}", "-", "{label}", "")'
    return Panel(
        title="Alerts that are firing",
        description="Each with what it is about. Begin here: the alert's runbook says what to do.",
        unit="none",
        queries=(
            Query(
                f"count by (alertname, severity, cluster, model, version) ({firing})",
                "{{alertname}}",
            ),
        ),
        links=(ALERTS_LINK, _TO_MODEL),
        kind="table",
        width=24,
        height=6,
        minimum=None,
        no_value="No alert is firing",
        columns=(
            Column("alertname", "Alert"),
            Column("severity", "Severity"),
            Column("cluster", "Cluster"),
            Column("model", "Model"),
            Column("version", "Version"),
            Column("A", "Alerts", "none"),
        ),
        series_link=series_link("${__data.fields.cluster}"),
    )


def _models() -> Panel:
    requests, failed = sum_by(_OF_ROW, _REQUESTS), sum_by(_OF_ROW, _FAILED)
    p99 = select("rayprism:request_seconds:p99", _SCOPE)
    weight = ours("rayprism_traffic_weight_ratio", _SCOPE)
    return Panel(
        title="Models and versions",
        description="What is served, version by version. A click on a row opens the model's page. "
        "Weight is the share of requests that a version is meant to get; one that nobody asks has "
        "no p99 and no error ratio.",
        unit="none",
        queries=(
            Query(sum_by(_OF_ROW, _READY), "replicas"),
            Query(f"avg by ({_OF_ROW}) ({weight})", "weight"),
            Query(requests, "requests"),
            Query(f"max by ({_OF_ROW}) ({p99})", "p99"),
            Query(ratio(failed, requests), "errors"),
        ),
        links=_SIDE_LINKS,
        kind="table",
        width=24,
        height=6,
        minimum=None,
        columns=(
            Column("cluster", "Cluster"),
            Column("model", "Model"),
            Column("version", "Version"),
            Column("A", "Replicas", "none"),
            Column("B", "Weight", "percentunit"),
            Column("C", "Requests", "reqps"),
            Column("D", "p99", "s"),
            Column("E", "Errors", "percentunit", _ERROR_STEPS),
        ),
        series_link=series_link("${__data.fields.cluster}"),
    )


def _traffic() -> tuple[Panel, ...]:
    failing = ours("rayprism_requests_total", _SCOPE, 'source="client"', 'outcome="server_error"')
    refused = ours("rayprism_requests_total", _SCOPE, 'source="client"', 'reason="overloaded"')
    all_of_model = f"(sum by (model) ({_REQUESTS}) > 0)"
    return (
        Panel(
            title="Requests by model",
            description="Requests of clients by second. Compare with what is usual at this hour.",
            unit="reqps",
            queries=(Query(sum_by("model", _REQUESTS), "{{model}}"),),
            links=_REQUEST_LINKS,
            series_link=series_link(),
        ),
        Panel(
            title="Share of traffic by version",
            description="Which versions answer a model's requests. During a rollout the candidate "
            "should have the share that its weight says; less means fallbacks.",
            unit="percentunit",
            maximum=1.0,
            queries=(
                Query(
                    f"{sum_by(_OF_VERSION, _REQUESTS)} / on (model) group_left () {all_of_model}",
                    "{{model}} {{version}}",
                ),
            ),
            links=_SIDE_LINKS,
            series_link=series_link(),
        ),
        Panel(
            title="Error ratio by model",
            description="Share of requests that failed on the server's side, over 5 minutes. The "
            "model's page has its availability target beside it.",
            unit="percentunit",
            queries=(
                Query(
                    f"max by (model) ({select('rayprism:error_ratio:rate5m', _SCOPE)})", "{{model}}"
                ),
            ),
            links=_REQUEST_LINKS,
            thresholds=_ERROR_STEPS,
            series_link=series_link(),
        ),
        Panel(
            title="Errors by model and reason",
            description="Failures on the server's side, in the time of each bar. `model_failed`: "
            "the model's own; `deadline_exceeded`: it is too slow; `internal`: a bug of the "
            "framework.",
            unit="short",
            queries=(Query(events("model, reason", failing), "{{model}} {{reason}}"),),
            links=_REQUEST_LINKS,
            width=12,
            bars=True,
            no_value="No errors",
            series_link=series_link(),
        ),
        Panel(
            title="Rejections",
            description="Requests refused because the queue was full (`overloaded`), in the time "
            "of each bar. More replicas are needed, or those there are became slow.",
            unit="short",
            queries=(Query(events(_OF_VERSION, refused), "{{model}} {{version}}"),),
            links=(_TO_MODEL, docs_link("batches-and-queue")),
            width=12,
            bars=True,
            no_value="No rejections",
            series_link=series_link(),
        ),
    )


def _latency() -> tuple[Panel, ...]:
    return tuple(
        Panel(
            title=f"{name} by version",
            description=f"{what} From the client's whole request to its answer, of requests that "
            "succeeded. The model's page shows in which stage the time went.",
            unit="s",
            queries=(
                Query(
                    f"max by ({_OF_VERSION}) "
                    f"({select(f'rayprism:request_seconds:{name}', _SCOPE)})",
                    "{{model}} {{version}}",
                ),
            ),
            links=_REQUEST_LINKS,
            width=12,
            series_link=series_link(),
        )
        for name, what in (
            ("p50", "Half of the requests are faster than this."),
            ("p99", "1 request in 100 is slower than this."),
        )
    )


def _versions() -> tuple[Panel, ...]:
    weight = ours("rayprism_traffic_weight_ratio", _SCOPE)
    fallbacks = ours("rayprism_fallbacks_total", _SCOPE)
    failures = ours("rayprism_loads_total", _SCOPE, 'outcome!="ok"')
    return (
        Panel(
            title="Replicas ready by version",
            description="Replicas that answer. A fall without a deployment means that replicas "
            "die: see the cluster's page and the replicas' logs.",
            unit="none",
            queries=(Query(sum_by(_OF_VERSION, _READY), "{{model}} {{version}}"),),
            links=_REPLICA_LINKS,
            width=6,
            decimals=0,
            series_link=series_link(),
        ),
        Panel(
            title="Weights in force",
            description="Share of a model's requests that each version is meant to get, as its "
            "replicas have it. In the seconds after a change replicas differ: this is their mean.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(f"avg by ({_OF_VERSION}) ({weight})", "{{model}} {{version}}"),),
            links=_SIDE_LINKS,
            width=6,
            series_link=series_link(),
        ),
        Panel(
            title="Fallbacks",
            description="Requests meant for a version that the stable one answered instead, in "
            "the time of each bar. Clients saw no error, but the version is not well.",
            unit="none",
            queries=(
                Query(
                    events("model, version, reason", fallbacks),
                    "{{model}} {{version}} {{reason}}",
                ),
            ),
            links=_SIDE_LINKS,
            width=6,
            bars=True,
            no_value="No fallbacks",
            series_link=series_link(),
        ),
        Panel(
            title="Failed loads",
            description="Replicas that could not load their model, in the time of each bar. "
            "`golden_mismatch`: the version computes something else here than where it "
            "was pushed.",
            unit="none",
            queries=(
                Query(
                    events("model, version, outcome", failures),
                    "{{model}} {{version}} {{outcome}}",
                ),
            ),
            links=_REPLICA_LINKS,
            width=6,
            bars=True,
            no_value="No failed loads",
            series_link=series_link(),
        ),
    )

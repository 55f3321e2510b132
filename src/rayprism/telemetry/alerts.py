"""What a person is told of, and when. docs/alerts.md has a section for each.

`page` is for what clients notice now; `ticket` is for the next working day.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rayprism.telemetry.promql import Durations, rose, sum_by

__all__ = ["RUNBOOK_URL", "Alert", "alert_groups"]

RUNBOOK_URL = "https://github.com/rayprism/rayprism/blob/main/docs/alerts.md"

_FAST_BURN = 14.4
_SLOW_BURN = 6.0
"""How many times faster than the error budget of 30 days allows.

Source: Google, The Site Reliability Workbook, chapter 5 "Alerting on SLOs", section 6 "Multiwindow,
Multi-Burn-Rate Alerts": 14.4 spends 2 % of the budget in one hour, 6 spends 5 % in six; the second,
twelve times shorter window ends the alert soon after the errors do.
"""

_MODEL = "cluster, model"
_VERSION = "cluster, model, version"
_DEPLOYMENT = "cluster, application, deployment"
_JOB = "cluster, batch_job, model, version"
_COUNT = '{{ $value | printf "%.0f" }}'
"""`increase` extrapolates: 1 may come out as 1.017."""

_LEAST_COUNT = 20
"""Fewer requests or outputs than this in a window say nothing of a share."""


Dashboard = Literal["model", "fleet", "batch", "cluster"]

_DASHBOARD_LABELS: dict[Dashboard, tuple[str, ...]] = {
    "model": ("model",),
    "fleet": (),
    "batch": ("batch_job",),
    "cluster": (),
}
"""Variables of a dashboard, besides `cluster`, that labels of its alerts set."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert rule.

    Args:
        name: As it is paged; also the heading in docs/alerts.md.
        severity: `page` or `ticket`.
        expr: Gives a series for each thing that is wrong.
        summary: One line, with labels.
        description: What the value is, and what it should be.
        wait: How long it has to last; empty for none.
        dashboard: Where one sees more.
    """

    name: str
    severity: Literal["page", "ticket"]
    expr: str
    summary: str
    description: str
    wait: str = ""
    dashboard: Dashboard = "model"

    def rule(self) -> dict[str, Any]:
        """As a rule file has it."""
        labels = ("cluster", *_DASHBOARD_LABELS[self.dashboard])
        shown = "&".join(f"var-{label}={{{{ $labels.{label} }}}}" for label in labels)
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.wait} if self.wait else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook": f"{RUNBOOK_URL}#{self.name.lower()}",
                "dashboard": f"/d/rayprism-{self.dashboard}?{shown}",
            },
        }


def alert_groups(durations: Durations) -> list[dict[str, Any]]:
    """Every alert, as the groups of a rule file."""
    groups = {
        "rayprism-objectives": _objectives(durations),
        "rayprism-replicas": _replicas(durations),
        "rayprism-versions": _versions(durations),
        "rayprism-jobs": _jobs(durations),
        "rayprism-monitoring": _monitoring(durations),
    }
    return [
        {"name": name, "rules": [alert.rule() for alert in alerts]}
        for name, alerts in groups.items()
    ]


def _objectives(durations: Durations) -> list[Alert]:
    return [
        _burn("Fast", "page", _FAST_BURN, ("5m", 300), ("1h", 3600), durations),
        _burn("Slow", "ticket", _SLOW_BURN, ("30m", 1800), ("6h", 21600), durations),
        Alert(
            name="RayprismLatencyOverTarget",
            severity="page",
            expr=(
                f"rayprism:request_seconds:p99\n> on ({_VERSION})\n"
                f"max by ({_VERSION}) (ray_rayprism_target_p99_seconds)"
            ),
            wait=durations.wait(300),
            summary="{{ $labels.model }} {{ $labels.version }} is slower than its target",
            description=(
                "The slowest hundredth of the requests takes {{ $value | humanizeDuration }} or "
                "more, over `p99_target_s`."
            ),
        ),
        Alert(
            name="RayprismQueueOld",
            severity="ticket",
            expr=f"max by ({_VERSION}) (ray_rayprism_queue_age_seconds) > 1",
            wait=durations.wait(60),
            summary="Requests wait long for {{ $labels.model }} {{ $labels.version }}",
            description=(
                "The oldest waiting request of a replica has been waiting for "
                "{{ $value | humanizeDuration }}: more comes than the replicas can answer."
            ),
        ),
    ]


def _burn(
    speed: str,
    severity: Literal["page", "ticket"],
    factor: float,
    short: tuple[str, float],
    long: tuple[str, float],
    durations: Durations,
) -> Alert:
    target = "ray_rayprism_target_availability_ratio"
    # A target goes with its replicas; the errors of the last of them still count.
    known = (
        f"(\n    max by ({_MODEL}) ({target})\n"
        f"    or max by ({_MODEL}) (last_over_time({target}[{durations.window(3600)}]))\n  )"
    )
    over = [
        f"(\n  rayprism:error_ratio:rate{window}\n  > on ({_MODEL}) {factor:g} * (1 - {known})\n)"
        for window, _ in (short, long)
    ]
    return Alert(
        name=f"RayprismErrorBudgetBurn{speed}",
        severity=severity,
        expr=f"\nand on ({_MODEL})\n".join(over),
        summary=f"{{{{ $labels.model }}}} fails over {factor:g} times more often than it may",
        description=(
            "{{ $value | humanizePercentage }} of the requests of the last "
            f"{durations.window(short[1])} ended in an error of the server, and the last "
            f"{durations.window(long[1])} were over {factor:g} times the error budget as well."
        ),
    )


def _replicas(durations: Durations) -> list[Alert]:
    wanted = f"max by ({_DEPLOYMENT}) (ray_serve_autoscaling_target_replicas)"
    # `max` first: a new controller of Serve reports the same replicas under another worker.
    each = f"max by ({_DEPLOYMENT}, replica) (ray_serve_deployment_replica_healthy)"
    healthy = sum_by(_DEPLOYMENT, each)
    window = durations.window(600)
    return [
        Alert(
            name="RayprismReplicasNotReady",
            severity="page",
            expr=f"{wanted} > 0\nunless on ({_DEPLOYMENT})\n{healthy} > 0",
            wait=durations.wait(300),
            summary="{{ $labels.application }} has no replica that answers",
            description="Wanted: {{ $value }}. Healthy: none.",
            dashboard="fleet",
        ),
        Alert(
            name="RayprismReplicasNotReady",
            severity="ticket",
            expr=f"{wanted} - {healthy} > 0\nand on ({_DEPLOYMENT})\n{healthy} > 0",
            wait=durations.wait(300),
            summary="{{ $labels.application }} has fewer replicas than it should",
            description="Missing, or not healthy: {{ $value }}.",
            dashboard="fleet",
        ),
        Alert(
            name="RayprismApplicationNotRunning",
            severity="page",
            # 0 is unknown, 3 and above are on their way or running.
            expr="(max by (cluster, application) (ray_serve_application_status) > 0) <= 2",
            wait=durations.wait(60),
            summary=(
                "{{ $labels.application }} is "
                "{{ if eq $value 1.0 }}DEPLOY_FAILED{{ else }}UNHEALTHY{{ end }}"
            ),
            description="Serve says so; `rayprism status` shows the reason.",
            dashboard="fleet",
        ),
        Alert(
            name="RayprismLoadFailing",
            severity="ticket",
            expr=rose('ray_rayprism_loads_total{outcome!="ok"}', f"{_VERSION}, outcome", window),
            summary="{{ $labels.model }} {{ $labels.version }} cannot load: {{ $labels.outcome }}",
            description=f"Replicas that tried to in the last {window}: {_COUNT}.",
        ),
        Alert(
            name="RayprismConfigRefused",
            severity="ticket",
            expr=rose("ray_rayprism_config_refusals_total", _VERSION, window),
            summary="{{ $labels.model }} {{ $labels.version }} refused its user_config",
            description=(
                f"Times in the last {window}: {_COUNT}. Its replicas go on with the last good one."
            ),
        ),
    ]


def _versions(durations: Durations) -> list[Alert]:
    return [_candidate_failing(durations), _candidate_slow(durations), _shadow(durations)]


def _candidate_failing(durations: Durations) -> Alert:
    window = durations.window(300)
    fallbacks = sum_by(_VERSION, f"increase(ray_rayprism_fallbacks_total[{window}])")
    answered = sum_by(
        _VERSION,
        f'increase(ray_rayprism_requests_total{{source="client", outcome="ok"}}[{window}])',
    )
    return Alert(
        name="RayprismCandidateFailing",
        severity="ticket",
        expr=(
            f"rayprism:fallback_ratio:rate5m > 0.05\nand on ({_VERSION})\n"
            f"{fallbacks} + ({answered} or {fallbacks} * 0) >= {_LEAST_COUNT}"
        ),
        summary="{{ $labels.model }} {{ $labels.version }} fails; the stable one answers for it",
        description=(
            "{{ $value | humanizePercentage }} of what was meant for it in the last "
            f"{window} went back to the stable version."
        ),
    )


def _candidate_slow(durations: Durations) -> Alert:
    p99 = "rayprism:request_seconds:p99"
    window = durations.window(600)
    counted = sum_by(_VERSION, f"increase(ray_rayprism_request_seconds_count[{window}])")
    return Alert(
        name="RayprismCandidateSlow",
        severity="ticket",
        expr=(
            f"(\n  {p99}\n  unless on ({_VERSION}) rayprism:stable:info\n)\n"
            f"> on ({_MODEL}) group_left ()\n"
            f"1.5 * max by ({_MODEL}) (\n"
            f"  {p99}\n  and on ({_VERSION}) rayprism:stable:info\n)\n"
            f"and on ({_VERSION})\n"
            f"max by ({_VERSION}) (ray_rayprism_traffic_weight_ratio) > 0\n"
            f"and on ({_VERSION})\n{counted} >= {_LEAST_COUNT}"
        ),
        wait=durations.wait(600),
        summary="{{ $labels.model }} {{ $labels.version }} is slower than the stable version",
        description=(
            "Its slowest hundredth takes {{ $value | humanizeDuration }} or more, over one and a "
            "half times as long as the stable version's."
        ),
    )


def _shadow(durations: Durations) -> Alert:
    labels = f"{_VERSION}, output"
    window = durations.window(900)
    metric = "ray_rayprism_shadow_outputs_total"
    disagreed = sum_by(labels, f'increase({metric}{{outcome="disagreed"}}[{window}])')
    compared = sum_by(labels, f"increase({metric}[{window}])")
    return Alert(
        name="RayprismShadowDisagrees",
        severity="ticket",
        expr=(
            f"{disagreed}\n/\n{compared}\n> 0.01\nand on ({labels})\n{compared} >= {_LEAST_COUNT}"
        ),
        summary=(
            "{{ $labels.model }} {{ $labels.version }} says something else than the stable version"
        ),
        description=(
            "Output {{ $labels.output }} differed in {{ $value | humanizePercentage }} of the "
            f"copies of the last {window}."
        ),
    )


def _jobs(durations: Durations) -> list[Alert]:
    window = durations.window(600)
    return [
        Alert(
            name="RayprismDeadLetters",
            severity="ticket",
            expr=rose('ray_rayprism_job_rows_total{outcome="dead_letter"}', _JOB, window),
            summary="Batch job {{ $labels.batch_job }} could not predict some rows",
            description=(
                f"Rows of the last {window}: {_COUNT}. Its dead letters have each with the reason."
            ),
            dashboard="batch",
        ),
        Alert(
            name="RayprismJobShardsFailing",
            severity="ticket",
            expr=rose('ray_rayprism_job_shards_total{outcome="failed"}', _JOB, window),
            summary="Shards of batch job {{ $labels.batch_job }} fail",
            description=f"Shards of the last {window}: {_COUNT}.",
            dashboard="batch",
        ),
    ]


def _monitoring(durations: Durations) -> list[Alert]:
    return [
        Alert(
            name="RayprismMetricsOverflow",
            severity="ticket",
            expr=(
                "count by (cluster, metric) (\n"
                '  label_replace({__name__=~"ray_rayprism_.+", otel_metric_overflow=~".+"}, '
                '"metric", "$1", "__name__", "(.+)")\n)'
            ),
            summary="{{ $labels.metric }} has more series than are kept",
            description="What is over the limit is counted without its labels.",
            dashboard="cluster",
        ),
        Alert(
            name="RayprismTargetDown",
            severity="page",
            # HAProxy runs only where Serve wants a proxy, and only once something is deployed: it
            # is missed where there are applications and no node of the cluster has one.
            expr=(
                'up{job="ray"} == 0\n'
                "or\n"
                'max by (cluster, job) (up{job="haproxy"}) == 0\n'
                "and on (cluster) group by (cluster) (ray_serve_application_status)"
            ),
            wait=durations.wait(120),
            summary=(
                "{{ $labels.job }}{{ with $labels.instance }} at {{ . }}{{ end }} gives no metrics"
            ),
            description="Prometheus cannot scrape it; other alerts cannot see what is there.",
            dashboard="cluster",
        ),
    ]

"""From samples of the nodes' metrics to what `rayprism top` shows. Does no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from rayprism.fleet.metrics import Sample
from rayprism.fleet.top_facts import VERSION, Facts, Key, key_of, ratio
from rayprism.fleet.top_rows import ApplicationRow, JobRow, NodeRow, VersionRow, View
from rayprism.telemetry.catalogue import STAGES, find_metric
from rayprism.telemetry.quantiles import find_quantile

__all__ = ["SETTLED_S", "WANTED", "keep_recent", "make_view"]

SETTLED_S = 10.0
"""From how long an interval on a rate is worth telling.

Replicas send every 5 s: a shorter interval holds what one of them did in 0, 5 or 10 s of work.
"""


def _exported(name: str) -> str:
    return find_metric(f"rayprism_{name}").exported


_REQUESTS = _exported("requests_total")
_ROWS = _exported("rows_total")
_REQUEST_SECONDS = _exported("request_seconds")
_STAGE_SECONDS = {stage: _exported(f"{stage}_seconds") for stage in STAGES}
_BATCH_ROWS = _exported("batch_rows")
_COST = _exported("batch_cost_total")
_PADDING = _exported("batch_padding_total")
_QUEUE_ROWS = _exported("queue_rows")
_QUEUE_AGE = _exported("queue_age_seconds")
_WEIGHT = _exported("traffic_weight_ratio")
_FALLBACKS = _exported("fallbacks_total")
_SHADOW_OUTPUTS = _exported("shadow_outputs_total")
_REPLICA_INFO = _exported("replica_info")
_TARGET_P99 = _exported("target_p99_seconds")
_JOB_ROWS = _exported("job_rows_total")
_JOB_SHARDS = _exported("job_shards_total")
_JOB_SHARD_SECONDS = _exported("job_shard_seconds")
_JOB_LEFT = _exported("job_shards_left")
_JOB_ACTORS = _exported("job_actors")

_APPLICATION_STATUS = "ray_serve_application_status"
_TARGET_REPLICAS = "ray_serve_autoscaling_target_replicas"
_REPLICA_HEALTHY = "ray_serve_deployment_replica_healthy"
_CPU = "ray_node_cpu_utilization"
_CPUS = "ray_node_cpu_count"
_MEMORY_USED = "ray_node_mem_used"
_MEMORY_TOTAL = "ray_node_mem_total"

_STATUSES = {
    0: "UNKNOWN",
    1: "DEPLOY_FAILED",
    2: "UNHEALTHY",
    3: "NOT_STARTED",
    4: "DELETING",
    5: "DEPLOYING",
    6: "RUNNING",
}
"""Source: Ray 2.60, the HELP line of `ray_serve_application_status`."""

_GAUGES = (
    *(_QUEUE_ROWS, _QUEUE_AGE, _WEIGHT, _REPLICA_INFO, _TARGET_P99, _JOB_LEFT, _JOB_ACTORS),
    *(_APPLICATION_STATUS, _TARGET_REPLICAS, _REPLICA_HEALTHY),
    *(_CPU, _CPUS, _MEMORY_USED, _MEMORY_TOTAL),
)
_MEANS = (*_STAGE_SECONDS.values(), _BATCH_ROWS, _JOB_SHARD_SECONDS)
_COUNTERS = (
    *(_REQUESTS, _ROWS, _COST, _PADDING, _FALLBACKS, _SHADOW_OUTPUTS, _JOB_ROWS, _JOB_SHARDS),
    *(f"{name}_{part}" for name in _MEANS for part in ("sum", "count")),
)
_BUCKETS = f"{_REQUEST_SECONDS}_bucket"

WANTED = frozenset({*_GAUGES, *_COUNTERS, _BUCKETS})
"""Names of the series that `make_view` reads."""
_OF_NODE = (_CPU, _CPUS, _MEMORY_USED, _MEMORY_TOTAL)


def keep_recent(samples: Iterable[Sample], window_s: float) -> list[Sample]:
    """Leaves out what is older than the window before the last sample.

    A tenth more is kept, so that a sample which came a little late does not shorten the window by
    a whole step.
    """
    kept = list(samples)
    return [sample for sample in kept if sample.at_s >= kept[-1].at_s - 1.1 * window_s]


def make_view(
    samples: Sequence[Sample], models: Collection[str] = (), *, settled_s: float = 0.0
) -> View:
    """What a fleet is doing.

    Args:
        samples: At least one; oldest first.
        models: To show; all where there is none.
        settled_s: Rates over a shorter interval are not told.
    """
    last = samples[-1]
    interval_s = last.at_s - samples[0].at_s
    told = interval_s > 0.0 and interval_s >= 0.95 * settled_s
    facts = Facts(samples, _COUNTERS, _BUCKETS, told=told)
    serve = _Serve(facts, samples)
    versions = tuple(_versions(facts, serve))
    jobs = tuple(_jobs(facts))
    known = {row.model for row in versions} | {row.model for row in jobs}
    view = View(
        interval_s=interval_s,
        notes=(),
        silent=dict(last.silent),
        applications=tuple(_applications(facts, serve)),
        versions=tuple(row for row in versions if not models or row.model in models),
        jobs=tuple(row for row in jobs if not models or row.model in models),
        nodes=tuple(_nodes(last)),
    )
    return replace(view, notes=tuple(_notes(view, facts, known, models)))


class _Serve:
    """What Serve says of applications, and replicas of themselves.

    Args:
        facts: Of now.
        samples: Oldest first.
    """

    def __init__(self, facts: Facts, samples: Sequence[Sample]) -> None:
        targets: dict[Key, float] = {}
        for labels, value in facts.now(_TARGET_REPLICAS):
            # When the controller has moved, its old node tells the old number for a while.
            key = key_of(labels, ("application", "deployment"))
            targets[key] = max(value, targets.get(key, 0.0))
        self.targets: dict[str, int] = {}
        for (application, _), value in targets.items():
            self.targets[application] = self.targets.get(application, 0) + int(value)
        self._versions: dict[str, set[Key]] = {}
        for labels, _ in facts.now(_REPLICA_INFO):
            application = dict(labels).get("application", "")
            self._versions.setdefault(application, set()).add(key_of(labels, VERSION))
        self.seen: dict[Key, set[str]] = {}
        """Applications by model and version; also those whose last replica has just gone."""
        for sample in samples:
            for node in sample.nodes.values():
                for labels in node.series.get(_REPLICA_INFO, ()):
                    applications = self.seen.setdefault(key_of(labels, VERSION), set())
                    applications.add(dict(labels).get("application", ""))

    def target_of(self, key: Key) -> int | None:
        """Replicas that there should be of a version.

        Of an application that is between two versions, nobody says how many of which.
        """
        applications = [
            name for name in self.seen.get(key, ()) if self._versions.get(name, {key}) == {key}
        ]
        found = [self.targets[name] for name in applications if name in self.targets]
        return sum(found) if found else None


def _versions(facts: Facts, serve: _Serve) -> Iterator[VersionRow]:
    keys = facts.keys_now(_REPLICA_INFO, VERSION) | facts.keys_now(_WEIGHT, VERSION)
    keys |= facts.keys_added((_REQUESTS, _ROWS, _FALLBACKS, _SHADOW_OUTPUTS), VERSION)
    keys |= {key for key in serve.seen if serve.target_of(key)}
    rows = [_version(facts, serve, key) for key in keys]
    yield from sorted(rows, key=lambda row: (row.model, row.role != "stable", _number(row.version)))


def _number(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else 0, version)


def _version(facts: Facts, serve: _Serve, key: Key) -> VersionRow:
    of = dict(zip(VERSION, key, strict=True))
    roles = {role for (role,) in facts.keys_now(_REPLICA_INFO, ("role",), **of)}
    weights = facts.values(_WEIGHT, **of)
    means = {stage: facts.mean(name, **of) for stage, name in _STAGE_SECONDS.items()}
    stages = {stage: mean for stage, mean in means.items() if mean is not None}
    buckets = facts.buckets(key)
    asked = {**of, "source": "client"}
    agreed = facts.added(_SHADOW_OUTPUTS, **of, outcome="agreed")
    return VersionRow(
        model=of["model"],
        version=of["version"],
        role="stable" if "stable" in roles else min(roles, default=None),
        weight_ratio=sum(weights) / len(weights) if weights else None,
        ready_replicas=int(facts.value(_REPLICA_INFO, **of)),
        target_replicas=serve.target_of(key),
        requests_per_s=facts.rate(_REQUESTS, **asked),
        errors_per_s=facts.rate(_REQUESTS, **asked, outcome="server_error"),
        error_ratio=ratio(
            facts.added(_REQUESTS, **asked, outcome="server_error"),
            facts.added(_REQUESTS, **asked),
        ),
        rejected_per_s=facts.rate(_REQUESTS, **asked, reason="overloaded"),
        p50_s=find_quantile(0.5, buckets),
        p99_s=find_quantile(0.99, buckets),
        target_p99_s=min(facts.values(_TARGET_P99, **of), default=None),
        stage_mean_s=stages,
        slowest_stage=max(stages, key=stages.__getitem__, default=None),
        rows_per_s=facts.rate(_ROWS, **of),
        batch_rows_mean=facts.mean(_BATCH_ROWS, **of),
        padding_ratio=ratio(facts.added(_PADDING, **of), facts.added(_COST, **of)),
        queue_rows=sum(facts.values(_QUEUE_ROWS, **of)),
        queue_age_s=max(facts.values(_QUEUE_AGE, **of), default=0.0),
        fallbacks_per_s=facts.rate(_FALLBACKS, **of),
        shadow_agreement_ratio=ratio(
            agreed, agreed + facts.added(_SHADOW_OUTPUTS, **of, outcome="disagreed")
        ),
    )


def _jobs(facts: Facts) -> Iterator[JobRow]:
    by = ("batch_job", *VERSION)
    for key in sorted(facts.keys_now(_JOB_LEFT, by) | facts.keys_added((_JOB_ROWS,), by)):
        of = dict(zip(by, key, strict=True))
        left = max(facts.values(_JOB_LEFT, **of), default=0.0)
        actors = max(facts.values(_JOB_ACTORS, **of), default=0.0)
        # Few shards may end within the interval, or none: then all that were counted tell.
        shard_s = facts.mean(_JOB_SHARD_SECONDS, **of) or ratio(
            facts.value(f"{_JOB_SHARD_SECONDS}_sum", **of),
            facts.value(f"{_JOB_SHARD_SECONDS}_count", **of),
        )
        yield JobRow(
            batch_job=of["batch_job"],
            model=of["model"],
            version=of["version"],
            rows_per_s=facts.rate(_JOB_ROWS, **of, outcome="predicted"),
            dead_letter_rows=int(facts.value(_JOB_ROWS, **of, outcome="dead_letter")),
            shards_done=int(facts.value(_JOB_SHARDS, **of, outcome="done")),
            shards_failed=int(facts.value(_JOB_SHARDS, **of, outcome="failed")),
            shards_left=int(left),
            actors=int(actors),
            left_s=None if shard_s is None else ratio(left * shard_s, actors),
        )


def _applications(facts: Facts, serve: _Serve) -> Iterator[ApplicationRow]:
    statuses = {
        dict(labels).get("application", ""): _STATUSES.get(int(value), "UNKNOWN")
        for labels, value in facts.now(_APPLICATION_STATUS)
    }
    for application, status in sorted(statuses.items()):
        healthy = int(facts.value(_REPLICA_HEALTHY, application=application))
        target = serve.targets.get(application)
        if status != "RUNNING" or (target is not None and healthy < target):
            yield ApplicationRow(application, status, healthy, target)


def _nodes(sample: Sample) -> Iterator[NodeRow]:
    found = {
        address: {name: max(node.series[name].values()) for name in _OF_NODE if name in node.series}
        for address, node in sample.nodes.items()
    }
    found = {address: values for address, values in found.items() if _CPU in values}
    hosts = [address.rpartition(":")[0] for address in found]
    for address, values in sorted(found.items()):
        host = address.rpartition(":")[0]
        yield NodeRow(
            address=host if hosts.count(host) == 1 else address,
            cpu_ratio=values[_CPU] / 100.0,
            cpus=values.get(_CPUS),
            memory_used_bytes=values.get(_MEMORY_USED),
            memory_total_bytes=values.get(_MEMORY_TOTAL),
        )


def _notes(
    view: View, facts: Facts, known: Collection[str], models: Collection[str]
) -> Iterator[str]:
    for address, reason in sorted(view.silent.items()):
        yield f"{address} does not answer ({reason}). What only it knows is not in here."
    if not facts.has_nodes:
        if not view.silent:
            yield "The dashboard does not know of any node yet."
        return
    for model in sorted(set(models) - set(known)):
        others = ", ".join(sorted(known)) or "none at all"
        yield f"Nothing is heard of a model {model!r}. There is {others}."
    if not known and not models:
        if facts.now(_APPLICATION_STATUS):
            yield "No model has sent metrics yet. A replica does so every 5 s once it is ready."
        else:
            yield "Nothing is deployed."
    rates = [row.requests_per_s for row in view.versions]
    if rates and all(rate == 0.0 for rate in rates):
        yield f"No client has asked for anything in the last {view.interval_s:.0f} s."
    if rates and None in rates:
        yield f"Rates are told from {SETTLED_S:g} s on: replicas send their counts every 5 s."

"""Batch jobs: how far they are, and what went wrong."""

from __future__ import annotations

from rayprism.telemetry.dashboards.expressions import events, ours, quantile, ratio, sum_by
from rayprism.telemetry.dashboards.panels import (
    RED_AT_ONE,
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

__all__ = ["batch_dashboard"]

_SCOPE = ('cluster=~"$cluster"', 'batch_job=~"$batch_job"')
_LINKS = (docs_link("batch-jobs"), page_link("cluster", "The cluster"))

# A shard takes up to an hour: within a minute there may be none.
_SHARD_WINDOW = "10m"

_PREDICTED = ours("rayprism_job_rows_total", _SCOPE, 'outcome="predicted"')
_DEAD = ours("rayprism_job_rows_total", _SCOPE, 'outcome="dead_letter"')
_SHARDS = ours("rayprism_job_shards_total", _SCOPE)
_DONE = ours("rayprism_job_shards_total", _SCOPE, 'outcome="done"')
_FAILED = ours("rayprism_job_shards_total", _SCOPE, 'outcome="failed"')
_LEFT = ours("rayprism_job_shards_left", _SCOPE)


def batch_dashboard() -> Dashboard:
    """The dashboard of batch jobs."""
    return Dashboard(
        name="batch",
        title="rayprism: batch jobs",
        description="Jobs that run models over large data: are they getting on, how long will it "
        "be, and which rows could not be predicted? A row counts when its shard is committed.",
        variables=(
            cluster_variable("ray_rayprism_job_rows_total"),
            Variable(
                "batch_job",
                "Batch job",
                'label_values(ray_rayprism_job_rows_total{cluster=~"$cluster"}, batch_job)',
            ),
        ),
        rows=(
            Row("Now", _stats()),
            Row("Rows", _rows()),
            Row("Shards", _shards()),
            Row("Actors", _actors()),
        ),
    )


def _share_done(labels: str) -> str:
    done, left = events(labels, _DONE, "$__range"), sum_by(labels, _LEFT)
    # The driver of a job that has ended tells no more what is left: nothing is.
    return ratio(done, f"({done} + ({left} or {done} * 0))")


def _stats() -> tuple[Panel, ...]:
    return (
        stat(
            "Rows predicted",
            "By second, of all chosen jobs.",
            "rowsps",
            f"sum(rate({_PREDICTED}[$__rate_interval])) or vector(0)",
            _LINKS,
        ),
        stat(
            "Dead letters",
            "Rows that could not be predicted, in the time shown. The job's dead-letter files have "
            "each with its error.",
            "short",
            f"{events('', _DEAD, '$__range')} or vector(0)",
            _LINKS,
            RED_AT_ONE,
        ),
        stat(
            "Shards left",
            "Shards that are not done yet, of all chosen jobs.",
            "none",
            f"sum({_LEFT}) or vector(0)",
            _LINKS,
        ),
        stat(
            "Shards failed",
            "In the time shown. A failed shard is tried again; one that fails again and again ends "
            "the job.",
            "none",
            f"{events('', _FAILED, '$__range')} or vector(0)",
            _LINKS,
            RED_AT_ONE,
        ),
        stat(
            "Actors at work",
            "Actors that did a shard in the last minute. 0 while shards are left: shards take "
            "longer than that, or the job waits for resources.",
            "none",
            f"sum({ours('rayprism_job_actors', _SCOPE)}) or vector(0)",
            _LINKS,
        ),
        stat(
            "Share done",
            "Of the shards that were done in the time shown or are left. Choose a time that begins "
            "before the jobs did.",
            "percentunit",
            _share_done(""),
            _LINKS,
            no_value="No job",
        ),
    )


def _rows() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Rows by job",
            description="Predicted rows by second. Steps are normal: rows count when their shard "
            "is committed.",
            unit="rowsps",
            queries=(
                Query(
                    sum_by("batch_job", f"rate({_PREDICTED}[$__rate_interval])"), "{{batch_job}}"
                ),
            ),
            links=_LINKS,
        ),
        Panel(
            title="Dead letters by second",
            description="Rows that could not be predicted. Many at once: one input file is not "
            "what the job expects, or the model fails on a kind of row.",
            unit="rowsps",
            queries=(
                Query(sum_by("batch_job", f"rate({_DEAD}[$__rate_interval])"), "{{batch_job}}"),
            ),
            links=_LINKS,
            no_value="No dead letters",
        ),
        Panel(
            title="Dead letters in all",
            description="As many as in the job's dead-letter files; a job's counts begin anew when "
            "the node of its driver does.",
            unit="short",
            queries=(Query(sum_by("batch_job", _DEAD), "{{batch_job}}"),),
            links=_LINKS,
            no_value="No dead letters",
        ),
    )


def _shards() -> tuple[Panel, ...]:
    buckets = ours("rayprism_job_shard_seconds", _SCOPE, part="bucket")
    return (
        Panel(
            title="Shards by outcome",
            description="Done or failed, in the time of each bar. No bars while "
            "shards are left: the job stands still.",
            unit="none",
            queries=(Query(events("batch_job, outcome", _SHARDS), "{{batch_job}} {{outcome}}"),),
            links=_LINKS,
            width=6,
            bars=True,
            no_value="No shards",
        ),
        Panel(
            title="Shards left by job",
            description="A straight line down shows when it will be done; a flat one that it "
            "stands still.",
            unit="none",
            queries=(Query(sum_by("batch_job", _LEFT), "{{batch_job}}"),),
            links=_LINKS,
            width=6,
            decimals=0,
            no_value="No job is running",
        ),
        Panel(
            title="Share done by job",
            description="Of the shards that were done in the time shown or are left. A job that "
            "was resumed begins at what its earlier run had left.",
            unit="percentunit",
            queries=(Query(_share_done("batch_job"), "{{batch_job}}"),),
            links=_LINKS,
            kind="bargauge",
            width=6,
            maximum=1.0,
            no_value="No job",
        ),
        Panel(
            title="Seconds of a shard",
            description="Time of done shards, over the last 10 minutes. p99 far above p50: some "
            "shards have longer rows, or some actors run on slower nodes.",
            unit="s",
            queries=tuple(
                Query(quantile(q, "batch_job", buckets, _SHARD_WINDOW), f"{name} {{{{batch_job}}}}")
                for q, name in ((0.5, "p50"), (0.99, "p99"))
            ),
            links=_LINKS,
            width=6,
            no_value="No shards",
        ),
    )


def _actors() -> tuple[Panel, ...]:
    return (
        Panel(
            title="Actors by job",
            description="Actors that did a shard in the last minute.",
            unit="none",
            queries=(
                Query(
                    sum_by("batch_job", ours("rayprism_job_actors", _SCOPE)),
                    "{{batch_job}}",
                ),
            ),
            links=_LINKS,
            width=12,
            decimals=0,
            no_value="No job is running",
        ),
        Panel(
            title="Memory of an actor",
            description="The most that any actor of the job has had. Near what a node has for "
            "each, make shards or batches smaller before Ray ends an actor.",
            unit="bytes",
            queries=(
                Query(
                    f"max by (batch_job) ({ours('rayprism_job_actor_memory_bytes', _SCOPE)})",
                    "{{batch_job}}",
                ),
            ),
            links=_LINKS,
            width=12,
            no_value="No job is running",
        ),
    )

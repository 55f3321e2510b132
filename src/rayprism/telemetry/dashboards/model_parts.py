"""The lower rows of a model's dashboard: batches, queue, memory, shadow copies, replicas."""

from __future__ import annotations

from rayprism.telemetry.dashboards.expressions import (
    events,
    mean,
    ours,
    quantile,
    rate,
    ratio,
    select,
    sum_by,
)
from rayprism.telemetry.dashboards.panels import TARGET, Panel, Query, docs_link, page_link
from rayprism.telemetry.dashboards.scopes import MODEL, VERSIONS

__all__ = ["batch_panels", "memory_panels", "queue_panels", "replica_panels", "shadow_panels"]

_TO_FLEET = page_link("fleet", "All models")
_TO_CLUSTER = page_link("cluster", "The cluster")
_BATCH_LINKS = (docs_link("batches-and-queue"), _TO_CLUSTER)
_QUEUE_LINKS = (docs_link("batches-and-queue"), _TO_CLUSTER)
_SIDE_LINKS = (docs_link("versions-side-by-side"), _TO_FLEET)
_REPLICA_LINKS = (docs_link("replicas"), _TO_CLUSTER)
_GPU_LINKS = (docs_link("gpus"), _TO_CLUSTER)
_NO_GPU = "No replica has a GPU"

_ALONE = "The model has one version"


def batch_panels() -> tuple[Panel, ...]:
    """How requests are put together."""
    parts = {
        part: ours("rayprism_batch_rows", VERSIONS, part=part)
        for part in ("bucket", "sum", "count")
    }
    cost = sum_by("version", rate(ours("rayprism_batch_cost_total", VERSIONS)))
    padding = sum_by("version", rate(ours("rayprism_batch_padding_total", VERSIONS)))
    return (
        Panel(
            title="Rows by second",
            description="Rows that were predicted, for whomever: a request may have many, and "
            "copies for a shadow count as well.",
            unit="rowsps",
            queries=(
                Query(
                    sum_by("version", rate(ours("rayprism_rows_total", VERSIONS))), "{{version}}"
                ),
            ),
            links=_BATCH_LINKS,
        ),
        Panel(
            title="Rows in a batch",
            description="Median and mean. 1 under load means that requests are not batched: look "
            "at the model's batching limits.",
            unit="short",
            queries=(
                Query(quantile(0.5, "version", parts["bucket"]), "p50 {{version}}"),
                Query(mean("version", parts["sum"], parts["count"]), "mean {{version}}"),
            ),
            links=_BATCH_LINKS,
        ),
        Panel(
            title="Batches by second",
            description="Of all replicas. With long batches this falls while rows do not.",
            unit="ops",
            queries=(Query(sum_by("version", rate(parts["count"])), "{{version}}"),),
            links=_BATCH_LINKS,
        ),
        Panel(
            title="Cost of batches",
            description="Rows times padded length by second, or rows where nothing is ragged: the "
            "work that the model was given.",
            unit="short",
            queries=(Query(cost, "{{version}}"),),
            links=_BATCH_LINKS,
            width=12,
        ),
        Panel(
            title="Padding",
            description="Share of that work that is padding. Above a half, requests of very "
            "different lengths share batches.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(ratio(padding, cost), "{{version}}"),),
            links=_BATCH_LINKS,
            width=12,
            thresholds=((0.5, "orange"),),
        ),
    )


def queue_panels() -> tuple[Panel, ...]:
    """What waits."""
    return (
        Panel(
            title="Rows waiting",
            description="Rows in the queue of each replica. One replica far above the others: it "
            "is slower; all of them: there are too few.",
            unit="short",
            queries=(
                Query(
                    f"max by (version, replica) ({ours('rayprism_queue_rows', VERSIONS)})",
                    "{{version}} {{replica}}",
                ),
            ),
            links=_QUEUE_LINKS,
            width=12,
        ),
        Panel(
            title="Age of the queue",
            description="How long the oldest request has been waiting in each replica. One that "
            "only rises is a replica that hangs.",
            unit="s",
            queries=(
                Query(
                    f"max by (version, replica) ({ours('rayprism_queue_age_seconds', VERSIONS)})",
                    "{{version}} {{replica}}",
                ),
            ),
            links=_QUEUE_LINKS,
            width=12,
            thresholds=((1.0, "orange"), (10.0, "red")),
        ),
    )


def memory_panels() -> tuple[Panel, ...]:
    """Whether batches fit, and what replicas have of their GPUs."""
    failed = ours("rayprism_out_of_memory_batches_total", VERSIONS)
    share = ours("rayprism_batch_limit_ratio", VERSIONS)
    used = ours("rayprism_gpu_memory_used_bytes", VERSIONS)
    limit = ours("rayprism_gpu_memory_limit_bytes", VERSIONS)
    busy = ours("rayprism_gpu_utilization_ratio", VERSIONS)
    return (
        Panel(
            title="Batches out of memory",
            description="Batches that did not fit into the memory of the device and were halved, "
            "in the time of each bar. Now and then: the bound of a batch is too high.",
            unit="none",
            queries=(Query(events("version", failed), "{{version}}"),),
            links=_BATCH_LINKS,
            width=6,
            bars=True,
            no_value="All of them fitted",
        ),
        Panel(
            title="Room for batches",
            description="What memory leaves of the configured bound of a batch, in the replica "
            "where it is least. Below 100 % batches did not fit, and are smaller for a while.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(f"min by (version) ({share})", "{{version}}"),),
            links=_BATCH_LINKS,
            width=6,
        ),
        Panel(
            title="GPU memory of replicas",
            description="What each replica's process has of its GPU, and the least that an engine "
            "may take for tensors (dashed); CUDA itself takes some more.",
            unit="bytes",
            queries=(
                Query(f"max by (version, replica) ({used})", "{{version}} {{replica}}"),
                Query(f"min({limit})", "limit", TARGET),
            ),
            links=_GPU_LINKS,
            width=6,
            no_value=_NO_GPU,
        ),
        Panel(
            title="GPUs of replicas",
            description="Share of the time in which anything ran on the GPUs that replicas are on. "
            "Low under load: batches are too small, or the CPU is what is slow.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(f"max by (version, gpu) ({busy})", "{{version}} {{gpu}}"),),
            links=_GPU_LINKS,
            width=6,
            no_value=_NO_GPU,
        ),
    )


def shadow_panels() -> tuple[Panel, ...]:
    """How a candidate does beside the stable version."""
    return (*_split_panels(), *_copy_panels())


def _split_panels() -> tuple[Panel, ...]:
    weight = ours("rayprism_traffic_weight_ratio", MODEL)
    fallbacks = ours("rayprism_fallbacks_total", VERSIONS)
    forward = {q: select(f"rayprism:stage_seconds:{q}", VERSIONS, 'stage="forward"') for q in _QS}
    return (
        Panel(
            title="Weights in force",
            description="Share of requests meant for each version, as the replicas of the stable "
            "application have it.",
            unit="percentunit",
            maximum=1.0,
            queries=(Query(f"avg by (version) ({weight})", "{{version}}"),),
            links=_SIDE_LINKS,
            width=6,
        ),
        Panel(
            title="Fallback share",
            description="Of the requests meant for a version, how many the stable one answered "
            "instead, over 5 minutes. Above 1 in 100 the candidate is not to be promoted.",
            unit="percentunit",
            queries=(
                Query(
                    f"max by (version) ({select('rayprism:fallback_ratio:rate5m', VERSIONS)})",
                    "{{version}}",
                ),
            ),
            links=_SIDE_LINKS,
            width=6,
            thresholds=((0.01, "orange"),),
            no_value=_ALONE,
        ),
        Panel(
            title="Fallbacks by reason",
            description="Why it did not answer, counted in the time of each bar.",
            unit="short",
            queries=(Query(events("version, reason", fallbacks), "{{version}} {{reason}}"),),
            links=_SIDE_LINKS,
            width=6,
            bars=True,
            no_value="No fallbacks",
        ),
        Panel(
            title="Forwarding",
            description="Sending a request on to a version, and its answer back: what a client of "
            "a candidate waits more than one of the stable version, and the candidate's own time.",
            unit="s",
            queries=tuple(
                Query(f"max by (version) ({forward[q]})", f"{q} {{{{version}}}}") for q in _QS
            ),
            links=_SIDE_LINKS,
            width=6,
            no_value="No requests are sent on",
        ),
    )


_QS = ("p50", "p99")


def _copy_panels() -> tuple[Panel, ...]:
    agreed = ours("rayprism_shadow_outputs_total", VERSIONS, 'outcome="agreed"')
    compared = ours("rayprism_shadow_outputs_total", VERSIONS)
    copies = ours("rayprism_shadow_copies_total", VERSIONS)
    labels = "version, output"
    return (
        Panel(
            title="Agreement of shadow copies",
            description="Share of compared outputs in which a candidate gave what the client got. "
            "Lower than expected: look at the examples that `rayprism evaluate` finds.",
            unit="percentunit",
            maximum=1.0,
            queries=(
                Query(
                    ratio(sum_by(labels, rate(agreed)), sum_by(labels, rate(compared))),
                    "{{version}} {{output}}",
                ),
            ),
            links=_SIDE_LINKS,
            width=12,
            no_value="No version gets copies",
        ),
        Panel(
            title="Shadow copies by outcome",
            description="Copies by second. `dropped` before they were sent: the share is more than "
            "there is room for; `failed`: the candidate did not answer.",
            unit="reqps",
            queries=(
                Query(
                    sum_by("version, outcome, reason", rate(copies)),
                    "{{version}} {{outcome}} {{reason}}",
                ),
            ),
            links=_SIDE_LINKS,
            width=12,
            no_value="No version gets copies",
        ),
    )


def replica_panels() -> tuple[Panel, ...]:
    """Where the model runs, and how it came there."""
    info = ours("rayprism_replica_info", VERSIONS)
    loads = ours("rayprism_loads_total", VERSIONS)
    loaded = sum_by("version", ours("rayprism_loads_total", VERSIONS, 'outcome="ok"'))
    spent = sum_by("version, step", ours("rayprism_load_seconds_total", VERSIONS))
    refusals = ours("rayprism_config_refusals_total", VERSIONS)
    return (
        Panel(
            title="Where replicas run",
            description="Ready replicas by version, runtime and device. A version that should be "
            "on a GPU and shows `cpu` is slow for that reason.",
            unit="none",
            queries=(
                Query(
                    sum_by("version, role, runtime, device", info),
                    "{{version}} {{role}} {{runtime}} {{device}}",
                ),
            ),
            links=_REPLICA_LINKS,
            width=6,
            decimals=0,
        ),
        Panel(
            title="Loads by outcome",
            description="Replicas that loaded their model or failed to, in the time of each bar. "
            "Loads that no deployment explains: replicas die and are replaced.",
            unit="none",
            queries=(Query(events("version, outcome", loads), "{{version}} {{outcome}}"),),
            links=_REPLICA_LINKS,
            width=6,
            bars=True,
        ),
        Panel(
            title="Time to load, by step",
            description="Mean of all successful loads since the nodes are up. It is how long a new "
            "replica takes; `verify` and `open` grow with the model's files.",
            unit="s",
            queries=(
                Query(
                    f"{spent} / on (version) group_left () ({loaded} > 0)", "{{version}} {{step}}"
                ),
            ),
            links=_REPLICA_LINKS,
            kind="bargauge",
            width=6,
        ),
        Panel(
            title="Refused configurations",
            description="Times that a replica refused a `user_config` and kept the last good one, "
            "in the time of each bar. Its log says what was wrong.",
            unit="none",
            queries=(Query(events("version", refusals), "{{version}}"),),
            links=_REPLICA_LINKS,
            width=6,
            bars=True,
            no_value="None was refused",
        ),
    )

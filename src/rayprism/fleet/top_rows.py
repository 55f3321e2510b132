"""What `rayprism top` shows, as values. Decided in `rayprism.fleet.top`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ApplicationRow", "JobRow", "NodeRow", "VersionRow", "View"]


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One version of a model.

    Units: `_per_s` is None until the interval is long enough; ratios are shares of 1, and None
    where there is nothing to share.

    Args:
        model: Its name.
        version: Its number.
        role: `stable`, `version`, or None where no replica is ready.
        weight_ratio: What it is meant to get of the model's requests.
        ready_replicas: That say of themselves that they are.
        target_replicas: What Serve wants; None where that is not known.
        requests_per_s: Of clients, that this version answered.
        errors_per_s: Of those, the ones that ended as `server_error`, rejected ones with them.
        error_ratio: Of requests.
        rejected_per_s: Because the queue was full.
        p50_s: Of successful requests of clients.
        p99_s: As `p50_s`.
        target_p99_s: `user_config.telemetry.p99_target_s`.
        stage_mean_s: Means by stage, of the stages that there were.
        slowest_stage: With the highest mean.
        rows_per_s: Predicted.
        batch_rows_mean: Rows of a batch.
        padding_ratio: Of what batches cost.
        queue_rows: That wait now, in all replicas.
        queue_age_s: Of the oldest request that waits.
        fallbacks_per_s: Requests meant for it that the stable version answered.
        shadow_agreement_ratio: Of compared outputs.
    """

    model: str
    version: str
    role: str | None
    weight_ratio: float | None
    ready_replicas: int
    target_replicas: int | None
    requests_per_s: float | None
    errors_per_s: float | None
    error_ratio: float | None
    rejected_per_s: float | None
    p50_s: float | None
    p99_s: float | None
    target_p99_s: float | None
    stage_mean_s: Mapping[str, float]
    slowest_stage: str | None
    rows_per_s: float | None
    batch_rows_mean: float | None
    padding_ratio: float | None
    queue_rows: float | None
    queue_age_s: float | None
    fallbacks_per_s: float | None
    shadow_agreement_ratio: float | None


@dataclass(frozen=True, slots=True)
class JobRow:
    """One batch job that runs.

    Args:
        batch_job: Its name.
        model: What it predicts with.
        version: Of that.
        rows_per_s: Of committed shards; None until the interval is long enough.
        dead_letter_rows: Since the nodes' agents have been counting, over all runs of that name.
        shards_done: As `dead_letter_rows`.
        shards_failed: As `dead_letter_rows`.
        shards_left: Not done yet.
        actors: That did a shard in the last minute.
        left_s: Shards that are left times the mean time of one, by the actors; None where no shard
            was done yet, or none in the last minute.
    """

    batch_job: str
    model: str
    version: str
    rows_per_s: float | None
    dead_letter_rows: float
    shards_done: float
    shards_failed: float
    shards_left: float
    actors: float
    left_s: float | None


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of the cluster."""

    address: str
    cpu_ratio: float
    cpus: float | None
    memory_used_bytes: float | None
    memory_total_bytes: float | None


@dataclass(frozen=True, slots=True)
class ApplicationRow:
    """An application of Serve that is not as it should be."""

    application: str
    status: str
    healthy_replicas: int
    target_replicas: int | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that is shown at one time.

    Args:
        interval_s: What rates and quantiles are over.
        notes: What one should know of it, in sentences.
        silent: Who did not answer, and why; the numbers are without those nodes.
        applications: Those that are not running, or lack replicas.
        versions: By model; the stable one first.
        jobs: By name.
        nodes: By address.
    """

    interval_s: float
    notes: tuple[str, ...]
    silent: Mapping[str, str]
    applications: tuple[ApplicationRow, ...]
    versions: tuple[VersionRow, ...]
    jobs: tuple[JobRow, ...]
    nodes: tuple[NodeRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

"""Every metric that rayprism records, once: name, kind, unit, labels, buckets, meaning.

Only what stands here can be recorded (`rayprism.telemetry.recorder`), and docs/metrics.md is made
from it. Names are as the code has them; Ray's metrics agent writes `ray_` before each.

No label holds what a client sent: all of their values come from Serve files, manifests, job files
or the lists below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CATALOGUE",
    "EXPORT_PREFIX",
    "LABELS",
    "REASONS",
    "STAGES",
    "Metric",
    "exported_names",
    "find_metric",
]

Kind = Literal["counter", "gauge", "histogram"]

EXPORT_PREFIX = "ray_"
"""What Ray's metrics agent writes before every name."""

SECONDS = (
    *(0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
    *(30.0, 60.0),
)
"""From a tenth of a millisecond to a minute, each at most three times the one before."""

SHARD_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0)

LABELS = {
    "model": "The model's name.",
    "version": "The version that did it. Of a request that a candidate answered, the candidate's.",
    "protocol": "`http` or `grpc`.",
    "source": "Who asked: `client`; `split`, the stable version for one of its clients; `shadow`, "
    "the stable version for a copy.",
    "outcome": "How it ended. Of requests: `ok`, `client_error` (4xx), `server_error` (5xx), "
    "`cancelled` (the client left).",
    "reason": "The code of the error, as in docs/protocol.md; `ok` where there is none.",
    "output": "The name of an output, from the manifest.",
    "application": "The Serve application.",
    "role": "`stable` where the application has the model's own address, else `version`.",
    "runtime": "`onnx`, `torch` or `python`.",
    "device": "Where the model runs.",
    "gpu": "UUID of the GPU, as `nvidia-smi -L` shows it; `GpuUuid` of Ray's own metrics.",
    "replica": "Serve's id of the replica.",
    "step": "Of loading: `imports`, `verify`, `open`, `warm_up`, `golden`.",
    "batch_job": "The batch job's name. Not `job`, which Prometheus sets itself.",
}

REASONS = (
    "ok",
    "cancelled",
    "deadline_exceeded",
    "internal",
    "invalid_input",
    "model_failed",
    "not_found",
    "not_ready",
    "overloaded",
    "too_large",
    "unsupported",
)
"""Values of `reason` of requests."""

STAGES = ("decode", "prepare", "queue", "compute", "encode", "forward")
"""The stages of a request in their order; each has a histogram `rayprism_<stage>_seconds`."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Args:
        name: Ends in its unit; counters in `_total` after it.
        kind: A histogram is exported as `_bucket`, with label `le`, `_sum` and `_count`.
        meaning: In a sentence.
        labels: Names, each in `LABELS`.
        buckets: Upper bounds of a histogram's buckets, without the last, infinite one.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return EXPORT_PREFIX + self.name


_VERSION = ("model", "version")
_REPLICA = (*_VERSION, "replica")
_JOB = ("batch_job", *_VERSION)


def _stage(stage: str, meaning: str) -> Metric:
    return Metric(f"rayprism_{stage}_seconds", "histogram", meaning, _VERSION, SECONDS)


CATALOGUE = (
    # Requests
    Metric(
        "rayprism_requests_total",
        "counter",
        "Requests for inference. With source `client` each request of a client is counted once, "
        "under the version that answered it.",
        (*_VERSION, "protocol", "source", "outcome", "reason"),
    ),
    Metric("rayprism_rows_total", "counter", "Rows that the version predicted.", _VERSION),
    _stage(
        "request",
        "From a client's whole request to its answer, where the client's connection is, by the "
        "version that answered. Successful requests only.",
    ),
    _stage("decode", "Reading the request: inflating, parsing, checking."),
    _stage("prepare", "Pre-processing of models that have it, with the wait for it."),
    _stage("queue", "Waiting for the model, until the batch begins."),
    _stage("compute", "The batch that the request was in: making it, running it, taking it apart."),
    _stage("encode", "Writing the answer, to the socket."),
    _stage("forward", "Sending the request on to this version, and its answer back."),
    # Batches
    Metric("rayprism_batch_rows", "histogram", "Rows in a batch.", _VERSION, ROWS),
    Metric(
        "rayprism_batch_cost_total",
        "counter",
        "What batches cost: rows times padded length; rows, where the model has no ragged axis.",
        _VERSION,
    ),
    Metric("rayprism_batch_padding_total", "counter", "Padding in that cost.", _VERSION),
    Metric(
        "rayprism_out_of_memory_batches_total",
        "counter",
        "Batches that did not fit into the memory of the device, and were halved.",
        _VERSION,
    ),
    Metric(
        "rayprism_batch_limit_ratio",
        "gauge",
        "What memory leaves of the bound of a batch: 1, or less where batches did not fit.",
        _REPLICA,
    ),
    # Queue
    Metric("rayprism_queue_rows", "gauge", "Rows that wait now.", _REPLICA),
    Metric(
        "rayprism_queue_age_seconds",
        "gauge",
        "How long the oldest waiting request has been waiting.",
        _REPLICA,
    ),
    # Versions side by side
    Metric(
        "rayprism_traffic_weight_ratio",
        "gauge",
        "Share of the model's requests that is meant for the version, 0 to 1. Only from replicas "
        "of the stable application.",
        _REPLICA,
    ),
    Metric(
        "rayprism_fallbacks_total",
        "counter",
        "Requests meant for this version that the stable version answered instead, and why.",
        (*_VERSION, "reason"),
    ),
    Metric(
        "rayprism_shadow_copies_total",
        "counter",
        "Copies for this version: `compared`, `dropped` before they were sent, or `failed`.",
        (*_VERSION, "outcome", "reason"),
    ),
    Metric(
        "rayprism_shadow_outputs_total",
        "counter",
        "Outputs of compared copies: `agreed` or `disagreed` with what the client got.",
        (*_VERSION, "output", "outcome"),
    ),
    # Replicas
    Metric(
        "rayprism_replica_info",
        "gauge",
        "1 for each replica that is ready.",
        (*_REPLICA, "application", "role", "runtime", "device"),
    ),
    Metric(
        "rayprism_loads_total",
        "counter",
        "Replicas that loaded their model, `ok`, or failed, by the code of the error "
        "(`golden_mismatch`, `digest_mismatch`, `load_failed`, ...).",
        (*_VERSION, "outcome"),
    ),
    Metric(
        "rayprism_load_seconds_total",
        "counter",
        "Time that loading took, by step; divide by successful loads.",
        (*_VERSION, "step"),
    ),
    Metric(
        "rayprism_config_refusals_total",
        "counter",
        "Times that a replica refused a `user_config` and kept the last good one.",
        _VERSION,
    ),
    Metric(
        "rayprism_target_p99_seconds",
        "gauge",
        "`user_config.telemetry.p99_target_s`, where it is given.",
        _REPLICA,
    ),
    Metric(
        "rayprism_target_availability_ratio",
        "gauge",
        "`user_config.telemetry.availability_percent`, as a share of 1.",
        _REPLICA,
    ),
    # GPUs
    Metric(
        "rayprism_gpu_memory_used_bytes",
        "gauge",
        "Memory that the replica's process has on its GPU, with what CUDA itself takes. Not where "
        "the container has process ids of its own, which NVML does not know.",
        (*_REPLICA, "gpu"),
    ),
    Metric(
        "rayprism_gpu_memory_limit_bytes",
        "gauge",
        "What the replica's engine may take of its GPU for tensors: by its part of the GPU.",
        (*_REPLICA, "gpu"),
    ),
    Metric(
        "rayprism_gpu_utilization_ratio",
        "gauge",
        "Share of the last moments in which anything ran on the replica's GPU, whoever's it was.",
        (*_REPLICA, "gpu"),
    ),
    # Batch jobs
    Metric(
        "rayprism_job_rows_total",
        "counter",
        "Rows of committed shards: `predicted`, or `dead_letter`.",
        (*_JOB, "outcome"),
    ),
    Metric(
        "rayprism_job_shards_total", "counter", "Shards: `done` or `failed`.", (*_JOB, "outcome")
    ),
    Metric("rayprism_job_shard_seconds", "histogram", "Time of a done shard.", _JOB, SHARD_SECONDS),
    Metric("rayprism_job_shards_left", "gauge", "Shards that are not done yet.", _JOB),
    Metric("rayprism_job_actors", "gauge", "Actors that did a shard in the last minute.", _JOB),
    Metric("rayprism_job_actor_memory_bytes", "gauge", "Most memory of any actor so far.", _JOB),
)

_BY_NAME = {metric.name: metric for metric in CATALOGUE}


def find_metric(name: str) -> Metric:
    """A metric by its name.

    Raises:
        KeyError: It is not in the catalogue.
    """
    return _BY_NAME[name]


def exported_names() -> frozenset[str]:
    """Every series name that Prometheus sees of the catalogue."""
    names = set()
    for metric in CATALOGUE:
        if metric.kind == "histogram":
            names |= {f"{metric.exported}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(metric.exported)
    return frozenset(names)

"""What a server tells about itself and its models: plain documents, the same for HTTP and gRPC.

Source: Open Inference Protocol v2 ("Server Metadata", "Model Metadata"); Triton's model
configuration, statistics and model repository extensions. Field names are those of the messages
in `oip.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from rayprism.core.tensors import Array, Datatype, TensorSpec

__all__ = [
    "EXTENSIONS",
    "BatchStatistics",
    "DurationStatistics",
    "ModelState",
    "ModelStatistics",
    "ServedModel",
    "model_config",
    "model_metadata",
    "model_ready",
    "model_statistics",
    "repository_index",
    "server_metadata",
]

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""Triton's names of the extensions that rayprism offers."""

ModelState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One served version, in the terms of the protocol's documents.

    Args:
        name: The model's name.
        version: As the protocol writes it: "3".
        inputs: What clients send.
        outputs: What clients get.
        batched: Whether axis 0 is the row.
        max_rows: Most rows in one batch.
        max_delay_s: How long a batch that is not full may wait.
        platform: As in "onnxruntime_onnx".
        backend: As in "onnxruntime".
        versions: Every version that clients can reach; empty means only this one.
        is_default: Whether requests that name no version get this one.
        default_timeout_s: For requests that name no time-out; 0 where there is none.
        priority_levels: Priorities run from 1 to this; 0 where there are none.
        default_priority: For requests that name none.
        description: For people.
        example: Inputs that work, such as the golden example's.
    """

    name: str
    version: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    batched: bool = True
    max_rows: int = 1
    max_delay_s: float = 0.0
    platform: str = ""
    backend: str = ""
    versions: Sequence[str] = ()
    is_default: bool = True
    default_timeout_s: float = 0.0
    priority_levels: int = 0
    default_priority: int = 0
    description: str = ""
    example: Mapping[str, Array] | None = None


@dataclass(frozen=True, slots=True)
class DurationStatistics:
    """How often something happened, and how long it took together.

    Args:
        count: How often.
        total_ns: All of them together, in nanoseconds.
    """

    count: int = 0
    total_ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Where the time of batches of one size went."""

    compute_input: DurationStatistics = DurationStatistics()
    compute_infer: DurationStatistics = DurationStatistics()
    compute_output: DurationStatistics = DurationStatistics()


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Counts of one version since its replica started.

    Args:
        inference_count: Rows that were inferred.
        execution_count: Batches that ran.
        last_inference_ms: When the last one ran, in milliseconds since 1970; 0 for never.
        success: Requests that were answered, over their whole time.
        fail: Requests that got an error.
        queue: The time that requests waited.
        compute_input: The time that making batches took.
        compute_infer: The time that the model took.
        compute_output: The time that taking batches apart took.
        batch_stats: By the number of rows in the batch.
    """

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: DurationStatistics = DurationStatistics()
    fail: DurationStatistics = DurationStatistics()
    queue: DurationStatistics = DurationStatistics()
    compute_input: DurationStatistics = DurationStatistics()
    compute_infer: DurationStatistics = DurationStatistics()
    compute_output: DurationStatistics = DurationStatistics()
    batch_stats: Mapping[int, BatchStatistics] = field(default_factory=dict)


@cache
def _package_version() -> str:
    try:
        return version("rayprism")
    except PackageNotFoundError:
        return "unknown"


def server_metadata() -> dict[str, Any]:
    """The answer to `GET /v2` and ServerMetadata."""
    return {"name": "rayprism", "version": _package_version(), "extensions": list(EXTENSIONS)}


def model_ready(model: ServedModel) -> dict[str, Any]:
    """The answer to `GET .../ready`, where the model is ready."""
    return {"name": model.name, "ready": True}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """The answer to `GET /v2/models/{model}` and ModelMetadata.

    The row axis of a batched model is -1, whatever batch the model was exported with: the server
    splits and pads.
    """
    return {
        "name": model.name,
        "versions": list(model.versions) or [model.version],
        "platform": model.platform,
        "inputs": [_tensor_metadata(spec, model.batched) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec, model.batched) for spec in model.outputs],
    }


def _tensor_metadata(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    shape = [-1, *spec.shape[1:]] if batched else list(spec.shape)
    return {"name": spec.name, "datatype": spec.datatype.value, "shape": shape}


def model_config(model: ServedModel) -> dict[str, Any]:
    """The answer to `GET .../config` and ModelConfig, as far as stock clients read it.

    `max_batch_size` above 0 tells clients that shapes here lack the row axis. It is no bound on
    the rows of one request: longer ones are split.
    """
    config: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "backend": model.backend,
        "max_batch_size": model.max_rows if model.batched else 0,
        "input": [_tensor_config(spec, model.batched) for spec in model.inputs],
        "output": [_tensor_config(spec, model.batched) for spec in model.outputs],
        "model_transaction_policy": {"decoupled": False},
    }
    if model.version.isdecimal():
        config["version_policy"] = {"specific": {"versions": [int(model.version)]}}
    if model.batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": [model.max_rows],
            "max_queue_delay_microseconds": round(model.max_delay_s * 1e6),
            "preserve_ordering": False,
            "priority_levels": model.priority_levels,
            "default_priority_level": model.default_priority,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": round(model.default_timeout_s * 1e6),
                "allow_timeout_override": True,
                "max_queue_size": 0,
            },
        }
    return config


def _tensor_config(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    # Triton's configuration calls BYTES strings.
    kind = "STRING" if spec.datatype is Datatype.BYTES else spec.datatype.value
    dims = list(spec.shape[1:] if batched else spec.shape)
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": dims}


def model_statistics(models: Sequence[tuple[ServedModel, ModelStatistics]]) -> dict[str, Any]:
    """The answer to `GET .../stats` and ModelStatistics."""
    return {"model_stats": [_statistics(model, statistics) for model, statistics in models]}


def _statistics(model: ServedModel, statistics: ModelStatistics) -> dict[str, Any]:
    durations = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": statistics.last_inference_ms,
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {name: _duration(getattr(statistics, name)) for name in durations},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(batch.compute_input),
                "compute_infer": _duration(batch.compute_infer),
                "compute_output": _duration(batch.compute_output),
            }
            for rows, batch in sorted(statistics.batch_stats.items())
        ],
    }


def _duration(duration: DurationStatistics) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.total_ns}


def repository_index(
    models: Sequence[tuple[ServedModel, ModelState, str]], *, ready_only: bool = False
) -> list[dict[str, Any]]:
    """The answer to `POST /v2/repository/index` and RepositoryIndex.

    Args:
        models: Each served version with its state, and why it is in it; empty for no reason.
        ready_only: Whether the client asks only for versions that are ready.
    """
    return [
        {"name": model.name, "version": model.version, "state": state, "reason": reason}
        for model, state, reason in models
        if state == "READY" or not ready_only
    ]
